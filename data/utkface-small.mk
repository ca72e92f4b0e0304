# UTKFace for two cores: 64 pixels, a small network from scratch, and the base model of faces that
# `make base DATASET=faces ROOT=~/UTKFace` trains. All values are ours, chosen on val (RESULTS.md).
# `make DATASET=utkface-small ROOT=~/UTKFace BIAS=0.99`
LOADER        = utkface
BASE          ?= base/faces
RECIPES       ?= erm groupdro dfr vanilla lora dreambooth clustered compositional
CLUSTER       ?= --min-size 20 --k-max 10
IMAGES        ?= 250
LORA          ?= --steps 150 --batch 16 --learning-rate 1e-3 --schedule cosine
DREAMBOOTH    ?= --steps 120 --batch 16 --learning-rate 3e-4 --schedule cosine
CLUSTERED     ?= --steps 60
COMPOSITIONAL ?= --steps 250 --batch 16 --learning-rate 5e-4 --schedule cosine --balance 0.5 \
  $(prior)
GENERATE      ?= --steps 10 --guidance-scale 1 --batch 32 --rare own
EPOCHS        ?= 8
CLASSIFIER    ?= --arch cnn --resolution 64 --batch 128 --learning-rate 0.05 \
  --last-layer-rate 0.001 --pretrain-epochs 60
export OMP_NUM_THREADS ?= 1
include data/utkface.mk
