# UTKFace (Zhang et al. 2017): y = gender, a = young or old, as From Fake to Real (FFR) bins it;
# PREPARE="--attribute race" or PREPARE="--bins ..." changes it. ROOT holds the aligned and cropped
# faces. Each value below says whose it is. We have not run them on the real images.
ROOT       ?= downloads/UTKFace
BIAS       ?= natural
# paper: make paper
PAPER_BIASES ?= natural 0.999
# ours: the paper says Stable Diffusion
BASE       ?= stable-diffusion-v1-5/stable-diffusion-v1-5
# ours
CLUSTER    ?= --min-size 50 --k-max 10
IMAGES     ?= 1000
# paper: alpha, keep, and at 0.999 no models of the rare groups' few images; ours: as Waterbirds
GENERATE   ?= --steps 25 --guidance-scale 2 --batch 16 --alpha 0.5 --keep 0.75 --rare-below 50
# diffusers: learning rates, rank, prior weight; ours: steps and batch
LORA       ?= --steps 1500 --batch 4 --learning-rate 1e-4 --rank 16
DREAMBOOTH ?= --steps 1500 --batch 1 --learning-rate 5e-6 --prior-weight 1 --gradient-checkpointing
COMPOSITIONAL ?= --steps 6000 --batch 4 --learning-rate 1e-5 --balance 0.25 --gradient-checkpointing
# FFR: ResNet-50, 50 epochs, batch 128; ours: the rate, and crops and flips at 224 pixels; paper:
# beta
EPOCHS     ?= 50
CLASSIFIER ?= --arch resnet50 --weights imagenet --resolution 224 --augment crop-flip --batch 128 \
  --learning-rate 1e-4 --weight-decay 1e-4 --beta 0.5
