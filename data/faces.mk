# What a base for UTKFace learns: the faces that its benchmark leaves out, aged 6 to 19 and from 51.
# `make base DATASET=faces ROOT=~/UTKFace`, then `make DATASET=utkface BASE=base/faces ...`.
LOADER   = utkface
BIAS     ?= natural
PREPARE  ?= --bins 6-19 51-116 --attributes young old
PRETRAIN ?= --size 64 --unet-widths 48 96 128 --flip --clip-steps 1000 --vae-steps 1200 \
  --unet-steps 1200
export OMP_NUM_THREADS ?= 1
