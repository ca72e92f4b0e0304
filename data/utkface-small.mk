# UTKFace for two cores: 64 pixels, a small network from scratch; recipes that need real images alone.
# `make DATASET=utkface-small ROOT=~/UTKFace BIAS=0.99`. All values are ours (RESULTS.md).
LOADER     = utkface
RECIPES    ?= erm resample groupdro dfr
BASE       ?= base/faces
EPOCHS     ?= 8
CLASSIFIER ?= --arch cnn --resolution 64 --batch 128 --learning-rate 0.05 --last-layer-rate 0.001
export OMP_NUM_THREADS ?= 1
include data/utkface.mk
