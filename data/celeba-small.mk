# CelebA for two cores: 10,000 images at 64 pixels, EfficientNet-Lite0 pretrained on ImageNet, see
# RESULTS.md; recipes that need real images alone. Values are those of waterbirds-small, not tuned.
# `make DATASET=celeba-small ROOT=~/celeba WEIGHTS=~/lite0.safetensors`
LOADER     = celeba
WEIGHTS    ?= downloads/lite0.safetensors
RECIPES    ?= erm groupdro dfr
EPOCHS     ?= 3
CLASSIFIER ?= --arch tf_efficientnet_lite0 --weights $(WEIGHTS) --resolution 64 --batch 32 \
  --learning-rate 3e-3
export OMP_NUM_THREADS ?= 1
include data/celeba.mk
