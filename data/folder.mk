# Your own images: ROOT holds them and a metadata.csv with file_name, y, a, and perhaps split and
# text. Copy this file to data/<name>.mk, add `LOADER = folder`, and run `make DATASET=<name>`. All
# values are ours, to start from.
ROOT       ?= downloads/images
# Without a column `a` in the metadata: recipes that need no attribute labels.
ifeq ($(origin LABELLED),undefined)
LABELLED   := $(shell head -qn1 "$(ROOT:~/%=$(HOME)/%)"/metadata.* 2>/dev/null | \
  grep -E '(^|[,"])a([,"]|[[:space:]]*$$)')
endif
WITH_LABELS    = erm groupdro vanilla lora dreambooth clustered
WITHOUT_LABELS = erm-free jtt-free dfr-free sage one-free clustered-free
RECIPES    ?= $(if $(LABELLED),$(WITH_LABELS),$(WITHOUT_LABELS))
REFERENCES ?= $(if $(LABELLED),erm groupdro,erm-free jtt-free)
BIAS       ?= natural
BASE       ?= stable-diffusion-v1-5/stable-diffusion-v1-5
CLIP       ?= openai/clip-vit-large-patch14
IMAGES     ?= 500
GENERATE   ?= --steps 25 --guidance-scale 2 --batch 16
LORA       ?= --steps 800 --batch 4 --learning-rate 1e-4 --rank 16
DREAMBOOTH ?= --steps 800 --batch 1 --learning-rate 5e-6 --prior-weight 1 --gradient-checkpointing
COMPOSITIONAL ?= --steps 4000 --batch 4 --learning-rate 1e-5 --balance 0.25 --gradient-checkpointing
EPOCHS     ?= 50
CLASSIFIER ?= --arch resnet50 --weights imagenet --resolution 224 --augment crop-flip --batch 64 \
  --learning-rate 1e-3
