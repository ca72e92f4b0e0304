# Waterbirds for two cores: files of 112 pixels, EfficientNet-Lite0 (4 million weights) pretrained
# on ImageNet, see RESULTS.md; recipes that need real images alone. All values are ours.
# `make DATASET=waterbirds-small ROOT=~/waterbirds WEIGHTS=~/lite0.safetensors`
LOADER     = waterbirds
WEIGHTS    ?= downloads/lite0.safetensors
RECIPES    ?= erm resample groupdro dfr
EPOCHS     ?= 3
CLASSIFIER ?= --arch tf_efficientnet_lite0 --weights $(WEIGHTS) --load-size 112 --resolution 96 \
  --batch 32 --learning-rate 3e-3
export OMP_NUM_THREADS ?= 1
include data/waterbirds.mk
