# Clustered DreamBooth: from biased images to a fair classifier.
# `make` runs the whole experiment, `make help` lists targets and settings.
# Make decides which stage runs again; a stage decides which of its units, images or seeds.

# ---- settings: the command line wins over data/<dataset>.mk, which wins over what stands here ----------------

DATASET ?= digits
BIAS    ?= 0.95
-include data/$(DATASET).mk
RECIPES ?= erm resample groupdro vanilla lora dreambooth clustered
SEEDS   ?= 0 1 2
BASE    ?= base/miniature
CLIP    ?= $(BASE)/clip
K       ?= auto
MODES   ?= auto
IMAGES  ?= 250
EPOCHS  ?= 30
SHARDS  ?= 1

# Empty unless set: more flags of a stage, whatever its --help tells (CLUSTER="--k-max 8"): PREPARE CLUSTER GENERATE
# CLASSIFIER PRETRAIN, and of finetune.py LORA, DREAMBOOTH and COMPOSITIONAL; LAUNCH stands before each command ("srun --gpus=1").


# A generative method is what is trained, on which unit. To add one: a word here and a line of its flags.
FINETUNED         = lora dreambooth clustered clustered-lora compositional
lora.is           = --method lora       --per group   --data $(DATA) $(LORA)
dreambooth.is     = --method dreambooth --per group   --data $(DATA) --prior $(RUN)/synthetic/vanilla $(DREAMBOOTH)
clustered.is      = --method dreambooth --per cluster --data $(RUN)/clusters --prior $(RUN)/synthetic/vanilla $(DREAMBOOTH)
clustered-lora.is = --method lora       --per cluster --data $(RUN)/clusters $(LORA)
compositional.is  = --method dreambooth --per dataset --data $(RUN)/modes $(COMPOSITIONAL)

# ---- the commands ---------------------------------------------------------------------------------------------

DATA    = data/$(DATASET)-$(BIAS)
RUN     = runs/$(DATASET)-$(BIAS)
PYTHON ?= python3
PY      = .venv/bin/python

.PHONY: all test help clean FORCE
.DELETE_ON_ERROR:

all: $(RUN)/results/config.json
	@cat $(RUN)/results/results.md
	@echo "Pictures: $(RUN)/results/*.png $(RUN)/clusters/*.png $(RUN)/synthetic/*/*.png $(BASE)/*.png"

test: .venv/installed
	$(PY) -m pytest -q tests

help:
	@echo "make           run $(RECIPES) on $(DATA)"
	@echo "make test      install, and run the tests"
	@echo "make -n        tell what would run"
	@echo "make clean     remove $(RUN)"
	@echo "Settings and their values now; make K=3 changes one:"
	@$(foreach v,DATASET BIAS RECIPES SEEDS BASE CLIP K MODES IMAGES EPOCHS SHARDS PREPARE CLUSTER LORA DREAMBOOTH COMPOSITIONAL GENERATE \
	  CLASSIFIER PRETRAIN LAUNCH,printf '  %-13s %s\n' '$(v)' '$($(v))';)

clean:
	rm -rf $(RUN)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

# ---- how a stage runs -----------------------------------------------------------------------------------------

# $(call stage,NAME,SCRIPT ARGUMENTS,OUT,INPUTS): runs `SCRIPT ARGUMENTS --out OUT` when an input is newer than
# OUT/config.json, the last file that a stage writes, or when the arguments are not those of the last time. These lie
# in a stamp, compared while make reads this file: so `make -n` tells the truth and changes nothing.
define stage
$(STAMPS)/$(1): $(if $(call differ,$(strip $(2)),$(shell cat $(STAMPS)/$(1) 2>/dev/null)),FORCE)
	@mkdir -p $$(@D); echo '$(strip $(2))' > $$@
$(3)/config.json: $(firstword $(2)) data/imagefolder.py $(STAMPS)/$(1) $(4) | .venv/installed
	$(call sharded,$(strip $(2)) --out $(3))
endef
STAMPS = $(RUN)/.stamps
differ = $(subst x$(1)x,,x$(2)x)$(subst x$(2)x,,x$(1)x)

# $(call sharded,COMMAND): in SHARDS processes side by side (as many as -j allows), then once more to publish.
SHARDED = finetune.py generate.py train_classifier.py
sharded = $(if $(and $(filter-out 1,$(SHARDS)),$(filter $(SHARDED),$(firstword $(1)))),+@$(MAKE) --no-print-directory \
	$(foreach i,$(shell seq 0 $$(($(SHARDS) - 1))),shard-$(i)) COMMAND='$(1)'$(newline)	)$(LAUNCH) $(PY) $(1)
shard-%:
	$(LAUNCH) $(PY) $(COMMAND) --shard $*/$(SHARDS)
define newline


endef

# ---- the stages, in the order in which data flows -------------------------------------------------------------

BASE_FILES = $(if $(filter base/miniature,$(BASE)),base/miniature/config.json,$(wildcard $(BASE)/model_index.json))
METHODS    = $(filter vanilla $(FINETUNED),$(RECIPES))

base/miniature/config.json: base/pretrain.py | .venv/installed
	$(LAUNCH) $(PY) base/pretrain.py $(PRETRAIN) --out base/miniature

$(eval $(call stage,prepare,data/prepare.py $(DATASET) --bias $(BIAS) $(PREPARE),$(DATA)))

$(eval $(call stage,cluster,cluster.py --data $(DATA) --clip $(CLIP) --k $(K) $(CLUSTER),$(RUN)/clusters,\
	$(DATA)/config.json $(BASE_FILES)))

$(eval $(call stage,modes,cluster.py --data $(DATA) --clip $(CLIP) --within class --k $(MODES) $(CLUSTER),\
	$(RUN)/modes,$(DATA)/config.json $(BASE_FILES)))

# The prior of a DreamBooth method is vanilla's synthetic set; a clustered method's data are the clusters.
inputs = $(DATA)/config.json $(BASE_FILES) $(patsubst %,%/config.json,\
	$(filter $(RUN)/clusters $(RUN)/modes $(RUN)/synthetic/vanilla,$($(1).is)))
$(foreach m,$(FINETUNED),$(eval $(call stage,finetune-$(m),\
	finetune.py --base $(BASE) $($(m).is),$(RUN)/models/$(m),$(call inputs,$(m)))))

$(foreach m,vanilla $(FINETUNED),$(eval $(call stage,generate-$(m),\
	generate.py --base $(BASE) --clip $(CLIP) --data $(DATA) --images $(IMAGES) $(GENERATE) \
	$(if $(filter-out vanilla,$(m)),--models $(RUN)/models/$(m)),$(RUN)/synthetic/$(m),\
	cluster.py $(DATA)/config.json $(BASE_FILES) $(if $(filter-out vanilla,$(m)),$(RUN)/models/$(m)/config.json))))

$(foreach r,$(RECIPES),$(eval $(call stage,classifier-$(r),\
	train_classifier.py --data $(DATA) --seeds $(SEEDS) --epochs $(EPOCHS) $(CLASSIFIER) \
	$(if $(filter $(r),$(METHODS)),--recipe two-stage --synthetic $(RUN)/synthetic/$(r),--recipe $(r)),\
	$(RUN)/classifiers/$(r),$(DATA)/config.json $(if $(filter $(r),$(METHODS)),$(RUN)/synthetic/$(r)/config.json))))

$(eval $(call stage,evaluate,evaluate.py --data $(DATA) --classifiers $(RECIPES:%=$(RUN)/classifiers/%) \
	--synthetic $(METHODS:%=$(RUN)/synthetic/%),$(RUN)/results,$(RECIPES:%=$(RUN)/classifiers/%/config.json)))
