# Your own images: ROOT has a folder for each class, or a table beside the images; data/folder.py
# tells what it may look like. Copy this file to data/<name>.mk, add `LOADER = folder`, and run
# `make DATASET=<name>`. All values are ours, to start from.
ROOT       ?= downloads/images
# Without attributes, in a column `a` or in folders below those of the classes: recipes that need no
# labels. LABELLED=yes (needed for a .parquet) and LABELLED= (empty) overrule what is found here.
ifeq ($(origin LABELLED),undefined)
root       := "$(ROOT:~/%=$(HOME)/%)"
LABELLED   := $(findstring --a ,$(PREPARE))$(shell \
  table=$$(ls $(root)/metadata.* 2>/dev/null | head -n1); \
  if [ "$$table" ]; then \
    head -n1 "$$table" | tr -d '\0' | tr ';\t' ',' | grep -aE '(^|[,"])a([,"]|[[:space:]]*$$)'; \
  else \
    depth=$$(ls -d $(root)/[Tt]rain* >/dev/null 2>&1 && echo 4 || echo 3); \
    cd $(root) 2>/dev/null && \
      find -L . -mindepth $$depth -type f -not -path '*/.*' -print -quit 2>/dev/null; \
  fi)
endif
ifeq ($(strip $(LABELLED)),)
RECIPES    ?= erm-free jtt-free dfr-free sage tokens-edited one-free clustered-free
REFERENCES ?= erm-free jtt-free
endif
BIAS       ?= natural
BASE       ?= stable-diffusion-v1-5/stable-diffusion-v1-5
IMAGES     ?= 500
GENERATE   ?= --steps 25 --guidance-scale 2 --batch 16
LORA       ?= --steps 800 --batch 4 --learning-rate 1e-4 --rank 16
DREAMBOOTH ?= --steps 800 --batch 1 --learning-rate 5e-6 --prior-weight 1 --gradient-checkpointing
COMPOSITIONAL ?= --steps 4000 --batch 4 --learning-rate 1e-5 --balance 0.25 --gradient-checkpointing
EPOCHS     ?= 50
CLASSIFIER ?= --arch resnet50 --weights imagenet --resolution 224 --augment crop-flip --batch 64 \
  --learning-rate 1e-3
