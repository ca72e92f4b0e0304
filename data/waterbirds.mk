# Waterbirds (Sagawa et al. 2020): y = landbird, waterbird, a = land, water. ROOT: its metadata.csv.
# Each value below says whose it is. We have not run them on the real images.
ROOT       ?= downloads/waterbird_complete95_forest2water2
BIAS       ?= natural
# paper: make paper
PAPER_BIASES ?= natural 0.999
# ours: the paper says Stable Diffusion
BASE       ?= stable-diffusion-v1-5/stable-diffusion-v1-5
# ours: the rare group has 56 images
CLUSTER    ?= --min-size 20 --k-max 10
IMAGES     ?= 1000
# paper: alpha, keep, and at 0.999 no models of the rare groups' few images; ours: 20 to 25 steps of
# DPM-Solver++, a guidance scale near 2 keeps the variety that training images need (DataDream)
GENERATE   ?= --steps 25 --guidance-scale 2 --batch 16 --alpha 0.5 --keep 0.75 --rare-below 10
# diffusers: learning rates, rank, prior weight; ours: steps and batch
LORA       ?= --steps 800 --batch 4 --learning-rate 1e-4 --rank 16
DREAMBOOTH ?= --steps 800 --batch 1 --learning-rate 5e-6 --prior-weight 1 --gradient-checkpointing
# ours, in the spirit of the miniature's
COMPOSITIONAL ?= --steps 4000 --batch 4 --learning-rate 1e-5 --balance 0.25 --gradient-checkpointing
# from Group-DRO's code: ResNet-50 with ImageNet weights, batch 128, rate 1e-3, weight decay 1e-4,
# 224 of 256 pixels, random crops and flips; they train for 300 epochs, ours are 100. paper: beta
EPOCHS     ?= 100
CLASSIFIER ?= --arch resnet50 --weights imagenet --resolution 224 --load-size 256 \
  --augment crop-flip --batch 128 --learning-rate 1e-3 --weight-decay 1e-4 --beta 0.5
