# What base/miniature learns: `make base` trains it again, in about an hour.
BIAS     ?= natural
NEW_BASE ?= base/miniature
PRETRAIN ?= --captions text text text digit_text digit_text digit_text digit_class_text \
  class_text colour_text --clip-first digit_class_text --clip-steps 3000 --vae-steps 4000 \
  --unet-steps 12000
export OMP_NUM_THREADS ?= 1
