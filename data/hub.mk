# A dataset of the Hugging Face Hub (or a local folder of parquet files), as `datasets.load_dataset` reads it; needs
# `.venv/bin/pip install datasets`. For example: make DATASET=hub ROOT=grodino/waterbirds PREPARE="--y label --a place". For
# a name of its own, copy this file to data/<name>.mk and add `LOADER = hub`. All values are ours, to start from.
ROOT       ?= grodino/waterbirds
BIAS       ?= natural
BASE       ?= stable-diffusion-v1-5/stable-diffusion-v1-5
CLIP       ?= openai/clip-vit-large-patch14
IMAGES     ?= 500
GENERATE   ?= --steps 25 --guidance-scale 2 --batch 16
LORA       ?= --steps 800 --batch 4 --learning-rate 1e-4 --rank 16
DREAMBOOTH ?= --steps 800 --batch 1 --learning-rate 5e-6 --prior-weight 1 --gradient-checkpointing
COMPOSITIONAL ?= --steps 4000 --batch 4 --learning-rate 1e-5 --balance 0.25 --gradient-checkpointing
EPOCHS     ?= 50
CLASSIFIER ?= --arch resnet50 --weights imagenet --resolution 224 --augment crop-flip --batch 64 --learning-rate 1e-3
