# CelebA (Liu et al. 2015): y = Blond_Hair, a = Male; PREPARE="--target Smiling --attribute Young"
# takes others. ROOT holds list_attr_celeba.txt (or .csv), list_eval_partition.txt (or .csv) and
# img_align_celeba. Each value below says whose it is. We have not run them on the real images.
ROOT       ?= downloads/celeba
BIAS       ?= natural
# paper: make paper
PAPER_BIASES ?= natural 0.999
# ours: the paper says Stable Diffusion
BASE       ?= stable-diffusion-v1-5/stable-diffusion-v1-5
# ours: thousands of images a group
CLUSTER    ?= --min-size 100 --k-max 10
IMAGES     ?= 2000
# paper: alpha, keep, and at 0.999 no models of the rare groups' few images; ours: as Waterbirds
GENERATE   ?= --steps 25 --guidance-scale 2 --batch 16 --alpha 0.5 --keep 0.75 --rare-below 100
# diffusers: learning rates, rank, prior weight; ours: steps and batch
LORA       ?= --steps 2000 --batch 4 --learning-rate 1e-4 --rank 16
DREAMBOOTH ?= --steps 2000 --batch 1 --learning-rate 5e-6 --prior-weight 1 --gradient-checkpointing
COMPOSITIONAL ?= --steps 8000 --batch 4 --learning-rate 1e-5 --balance 0.25 --gradient-checkpointing
# from Group-DRO's code: ResNet-50 with ImageNet weights, batch 128, rate 1e-4, weight decay 1e-4,
# 50 epochs, random crops and flips at 224 pixels. paper: beta
EPOCHS     ?= 50
CLASSIFIER ?= --arch resnet50 --weights imagenet --resolution 224 --augment crop-flip --batch 128 \
  --learning-rate 1e-4 --weight-decay 1e-4 --beta 0.5
