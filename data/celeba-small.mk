# CelebA for two cores: 10,000 images of 89 x 109 pixels, EfficientNet-Lite0 (4 million weights) pretrained
# on ImageNet, see RESULTS.md; recipes that need real images alone. All values are ours.
# `make DATASET=celeba-small ROOT=~/celeba WEIGHTS=~/lite0.safetensors`
LOADER     = celeba
WEIGHTS    ?= downloads/lite0.safetensors
RECIPES    ?= erm resample groupdro dfr
EPOCHS     ?= 3
CLASSIFIER ?= --arch tf_efficientnet_lite0 --weights $(WEIGHTS) --resolution 64 \
  --batch 32 --learning-rate 3e-3
export OMP_NUM_THREADS ?= 1
include data/celeba.mk
