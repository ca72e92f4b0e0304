# Clustered DreamBooth: from biased images to a fair classifier.
# `make` runs the whole experiment, `make help` lists targets and settings.
# Make decides which stage runs again; a stage decides which of its units, images or seeds.

# ---- settings: the command line wins over data/<dataset>.mk, which wins over what stands here ----------------

DATASET ?= digits
-include data/$(DATASET).mk
LOADER  ?= $(DATASET)
BIAS    ?= 0.95
SWEEP   ?= 0.5 0.8 0.9 0.95 0.99 1
ifneq ($(word 2,$(BIAS)),)
SWEEP         := $(BIAS)
override BIAS := $(firstword $(BIAS))
endif
RECIPES ?= erm resample groupdro vanilla lora dreambooth clustered
SEEDS   ?= 0 1 2
# of clustering, fine-tuning and generation: one run each, the first in RUN, whose results take all of them together
MODEL_SEEDS ?= 0
BASE    ?= base/miniature
CLIP    ?= $(BASE)/clip
K       ?= auto
MODES   ?= auto
IMAGES  ?= 250
EPOCHS  ?= 30
SHARDS  ?= 1
# no: a method's weights are removed once its images are made, and trained again when others are wanted
KEEP_WEIGHTS ?= yes

# Empty unless set: more flags of a stage, whatever its --help tells (CLUSTER="--k-max 8"): PREPARE CLUSTER GENERATE
# CLASSIFIER PRETRAIN, and of finetune.py LORA, DREAMBOOTH, CLUSTERED (after DREAMBOOTH's) and COMPOSITIONAL; LAUNCH
# stands before each command ("srun --gpus=1").

# A generative method is what is trained, on which unit. To add one: a word here and a line of its flags.
FINETUNED         = lora dreambooth clustered clustered-lora one-model compositional $(CLUSTERINGS) clustered-no-prior
lora.is           = --method lora       --per group   --data $(DATA) $(LORA)
dreambooth.is     = --method dreambooth --per group   --data $(DATA) --prior $(RUN)/synthetic/vanilla $(DREAMBOOTH)
clustered.is      = --method dreambooth --per cluster --data $(RUN)/clusters --prior $(RUN)/synthetic/vanilla \
	$(DREAMBOOTH) $(CLUSTERED)
clustered-lora.is = --method lora       --per cluster --data $(RUN)/clusters $(LORA)
one-model.is      = --method dreambooth --per dataset --data $(DATA) $(COMPOSITIONAL)
compositional.is  = --method dreambooth --per dataset --data $(RUN)/modes $(COMPOSITIONAL)

# Ablations: `make ablate` compares recipes that differ from clustered in one setting, a table and a figure for each.
ABLATIONS       = clusters clip-threshold lambda images second-stage prior
clusters        = clustered-k1 clustered-k2 clustered-k5 clustered-k10 clustered-k5-rare clustered
clip-threshold  = clustered-clip0 clustered clustered-clip0.5 clustered-clip0.9
lambda          = lambda0+clustered lambda0.1+clustered clustered lambda1+clustered
images          = clustered-images50 clustered-images100 clustered clustered-images500
second-stage    = clustered two-stage-whole+clustered
prior           = clustered clustered-no-prior

# What is not clustered's own: flags of cluster.py, finetune.py and generate.py (on whose models), of the classifier.
CLUSTERINGS            = $(filter clustered-k%,$(clusters))
clustered-k1.k         = --k 1
clustered-k2.k         = --k 2
clustered-k5.k         = --k 5
clustered-k10.k        = --k 10
clustered-k5-rare.k    = --k 5 --min-size 5
$(foreach k,$(CLUSTERINGS),$(eval $(k).is = $$(subst /clusters,/$(k:clustered-%=clusters-%),$$(clustered.is))))
clustered-no-prior.is  = --method dreambooth --per cluster --data $(RUN)/clusters $(DREAMBOOTH) $(CLUSTERED)
REDRAWN                = $(filter clustered-clip% clustered-images%,$(clip-threshold) $(images))
$(foreach m,$(REDRAWN),$(eval $(m).models = clustered))
$(foreach m,$(filter clustered-clip%,$(REDRAWN)),$(eval $(m).draw = --clip-threshold $(m:clustered-clip%=%)))
$(foreach m,$(filter clustered-images%,$(REDRAWN)),$(eval $(m).draw = --images $(m:clustered-images%=%)))
$(foreach r,$(filter lambda%,$(lambda)),$(eval $(firstword $(subst +, ,$(r))).is = \
	two-stage --contrastive $(patsubst lambda%,%,$(firstword $(subst +, ,$(r))))))

# ---- the commands ---------------------------------------------------------------------------------------------

DATA    = data/$(DATASET)-$(BIAS)
RUN     = $(call run_of,$(firstword $(MODEL_SEEDS)))
run_of  = runs/$(DATASET)-$(BIAS)$(patsubst %,-seed%,$(filter-out 0,$(1)))
SEED    = --seed $(firstword $(MODEL_SEEDS))
PYTHON ?= python3
PY      = .venv/bin/python

# Two makes would write the same files: a make leaves its process id for each run that it works on, and for what all runs
# share and nobody has made yet; a second one on any of these is refused while it lives.
BIASES = $(if $(filter sweep,$(MAKECMDGOALS)),$(SWEEP),$(BIAS))
LOCKS := $(patsubst %,runs/%.pid,$(notdir $(foreach BIAS,$(BIASES),$(foreach s,$(MODEL_SEEDS),$(call run_of,$(s)))) \
	$(if $(wildcard .venv/installed),,venv) $(if $(wildcard $(BASE)/config.json),,$(filter base/miniature,$(BASE)))))
define hold
mkdir -p runs; for lock in runs/*.pid; do
  pid=$$(cat $$lock 2>/dev/null);
  [ "$$pid" != $$PPID ] && { ps -o comm= -p "$$pid" || cat "/proc/$$pid/comm"; } 2>/dev/null | grep -q make || rm -f $$lock;
done; for lock in $(LOCKS); do
  (set -C; echo $$PPID > $$lock) 2>/dev/null && held="$$held $$lock" && continue;
  rm -f $$held; echo "another make (process $$(cat $$lock)) is at work on $$(basename $$lock .pid)"; break;
done
endef
ifeq ($(MAKELEVEL)$(findstring n,$(filter-out -%,$(firstword $(MAKEFLAGS)))),0)
ifeq ($(filter help test test_% torture clean .venv/installed,$(MAKECMDGOALS)),)
HOLDER := $(shell $(hold))
$(if $(HOLDER),$(error $(HOLDER): wait for it, or stop it))
endif
endif

.PHONY: all sweep each-bias ablate ablations test torture help clean FORCE
.DELETE_ON_ERROR:

all: $(RUN)/results/report.html
	@cat $(RUN)/results/results.md $(if $(METHODS),$(RUN)/results/cost.md)
	@rm -f $(LOCKS)
	@echo "Report: $(RUN)/results/report.html"
	@echo "Pictures: $(RUN)/results/*.png $(RUN)/images/*.png $(RUN)/clusters/*.png $(RUN)/synthetic/*/*.png $(BASE)/*.png"

# Worst-group accuracy against bias: make sweep, or make sweep BIAS="0.9 0.99".
sweep: each-bias
	$(PY) evaluate.py --sweep $(SWEEP:%=runs/$(DATASET)-%/results) --out runs/$(DATASET)-sweep
	@rm -f $(LOCKS)

each-bias:
	$(foreach b,$(SWEEP),+@$(MAKE) --no-print-directory BIAS=$(b) runs/$(DATASET)-$(b)/results/config.json$(newline)	)

ablate:
	+@$(MAKE) --no-print-directory KEEP_WEIGHTS=yes RECIPES='$(sort $(foreach a,$(ABLATIONS),$($(a))))' ablations
	@rm -f $(LOCKS)
	@echo "Tables and figures: $(RUN)/ablations/*/results.md $(RUN)/ablations/*/worst_group.png"

ablations: $(ABLATIONS:%=$(RUN)/ablations/%/config.json) $(RUN)/ablations/synthetic/config.json

# Most of a test is the start of a script, on one core: so two files at once, a thread each.
test: .venv/installed
	+@$(MAKE) -k -j2 --no-print-directory --output-sync $(patsubst tests/%.py,%,$(wildcard tests/test_*.py))
test_%:
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/$@.py

# The long version of tests/test_kills.py and tests/test_hostile.py.
torture: .venv/installed
	+@TORTURE=1 $(MAKE) -k -j2 --no-print-directory --output-sync test_kills test_hostile

help:
	@echo "make           run $(RECIPES) on $(DATA)"
	@echo "make sweep     the same for every bias of $(SWEEP)"
	@echo "make ablate    clustered with one setting changed: $(ABLATIONS)"
	@echo "make test      install, and run the tests"
	@echo "make torture   kills, full disks, bad input, 100,000 images: at length"
	@echo "make -n        tell what would run"
	@echo "make clean     remove $(RUN)"
	@echo "Settings and their values now; make K=3 changes one:"
	@$(foreach v,DATASET BIAS SWEEP RECIPES SEEDS MODEL_SEEDS BASE CLIP K MODES IMAGES EPOCHS SHARDS KEEP_WEIGHTS \
	  PREPARE CLUSTER LORA DREAMBOOTH CLUSTERED COMPOSITIONAL GENERATE CLASSIFIER PRETRAIN JUDGE LAUNCH,\
	  printf '  %-13s %s\n' '$(v)' '$($(v))';)

clean:
	rm -rf $(RUN)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

# ---- how a stage runs -----------------------------------------------------------------------------------------

# $(call stage,NAME,SCRIPT ARGUMENTS,OUT,INPUTS,FIRST): runs `SCRIPT ARGUMENTS --out OUT` when an input is newer than
# OUT/config.json, the last file that a stage writes, or when the arguments are not those of the last time. These lie
# in a stamp, compared while make reads this file: so `make -n` tells the truth and changes nothing. FIRST, where it is
# given, is a command that runs before.
define stage
$(STAMPS)/$(1): $(if $(call differ,$(strip $(2)),$(shell cat $(STAMPS)/$(1) 2>/dev/null)),FORCE)
	@mkdir -p $$(@D); echo $(call quoted,$(strip $(2))) > $$@
$(3)/config.json: $(firstword $(2)) data/imagefolder.py $(STAMPS)/$(1) $(4) | .venv/installed
	$(if $(strip $(5)),$(call sharded,$(strip $(5))))
	$(call sharded,$(strip $(2)) --out $(3))
endef
STAMPS = $(if $(filter prepare,$(1)),$(call run_of,0),$(RUN))/.stamps
quoted = '$(subst ','\'',$(1))'
differ = $(subst x$(1)x,,x$(2)x)$(subst x$(2)x,,x$(1)x)

# $(call sharded,COMMAND): in SHARDS processes side by side (as many as -j allows), then once more to publish.
SHARDED = finetune.py generate.py train_classifier.py
sharded = $(if $(and $(filter-out 1,$(SHARDS)),$(filter $(SHARDED),$(firstword $(1)))),+@$(MAKE) --no-print-directory \
	$(foreach i,$(shell seq 0 $$(($(SHARDS) - 1))),shard-$(i)) COMMAND=$(call quoted,$(1))$(newline)	)$(LAUNCH) $(PY) $(1)
shard-%:
	$(LAUNCH) $(PY) $(COMMAND) --shard $*/$(SHARDS)
define newline


endef

# ---- the stages, in the order in which data flows -------------------------------------------------------------

BASE_FILES = $(if $(filter base/miniature,$(BASE)),base/miniature/config.json,$(wildcard $(BASE)/model_index.json))

# A recipe is a word: of train_classifier.py (erm), or a generative method, which stands for two-stage on its images
# (clustered), or one of each (filled+clustered). ffr alone learns from vanilla.
parts   = $(subst +, ,$(if $(filter ffr ffr-groupdro,$(1)),$(1)+vanilla,$(1)))
DRAWN   = vanilla $(FINETUNED) $(REDRAWN)
how     = $(foreach word,$(or $(filter-out $(DRAWN),$(call parts,$(1))),two-stage),$(or $($(word).is),$(word)))
drawn   = $(filter $(DRAWN),$(call parts,$(1)))
METHODS = $(sort $(foreach r,$(RECIPES),$(call drawn,$(r))))

base/miniature/config.json: base/pretrain.py | .venv/installed
	$(LAUNCH) $(PY) base/pretrain.py $(PRETRAIN) --out base/miniature

$(eval $(call stage,prepare,data/prepare.py $(LOADER) --bias $(BIAS) $(PREPARE),$(DATA)))

$(eval $(call stage,cluster,cluster.py --data $(DATA) --clip $(CLIP) --k $(K) $(SEED) $(CLUSTER),$(RUN)/clusters,\
	$(DATA)/config.json $(BASE_FILES)))

$(foreach k,$(CLUSTERINGS:clustered-%=%),$(eval $(call stage,cluster-$(k),\
	cluster.py --data $(DATA) --clip $(CLIP) $(SEED) $(CLUSTER) $(clustered-$(k).k),$(RUN)/clusters-$(k),\
	$(DATA)/config.json $(BASE_FILES))))

$(eval $(call stage,modes,cluster.py --data $(DATA) --clip $(CLIP) --within class --k $(MODES) $(SEED) $(CLUSTER),\
	$(RUN)/modes,$(DATA)/config.json $(BASE_FILES)))

# The prior of a DreamBooth method is vanilla's synthetic set; a clustered method's data are the clusters.
inputs = $(DATA)/config.json $(BASE_FILES) $(patsubst %,%/config.json,\
	$(filter $(RUN)/clusters% $(RUN)/modes $(RUN)/synthetic/vanilla,$($(1).is)))
$(foreach m,$(FINETUNED),$(eval $(call stage,finetune-$(m),\
	finetune.py --base $(BASE) $(SEED) $($(m).is),$(RUN)/models/$(m),$(call inputs,$(m)))))

dropped = $(if $(filter no,$(KEEP_WEIGHTS)),$(filter $(FINETUNED),$(1)))

models_of = $(if $(filter-out vanilla,$(1)),$(RUN)/models/$(or $($(1).models),$(1)))

$(foreach m,$(DRAWN),$(eval $(call stage,generate-$(m),\
	generate.py --base $(BASE) --clip $(CLIP) --data $(DATA) --images $(IMAGES) $(SEED) $(GENERATE) $($(m).draw) \
	$(addprefix --models ,$(call models_of,$(m))) $(if $(call dropped,$(m)),--drop-weights),\
	$(RUN)/synthetic/$(m),\
	cluster.py $(DATA)/config.json $(BASE_FILES) $(addsuffix /config.json,$(call models_of,$(m))),\
	$(if $(call dropped,$(m)),finetune.py --base $(BASE) $(SEED) $($(m).is) --out $(RUN)/models/$(m)))))

$(foreach r,$(RECIPES),$(eval $(call stage,classifier-$(r),\
	train_classifier.py --data $(DATA) --seeds $(SEEDS) --epochs $(EPOCHS) $(CLASSIFIER) \
	--recipe $(call how,$(r)) $(patsubst %,--synthetic $(RUN)/synthetic/%,$(call drawn,$(r))),\
	$(RUN)/classifiers/$(r),$(DATA)/config.json $(patsubst %,$(RUN)/synthetic/%/config.json,$(call drawn,$(r))))))

# JUDGE=runs/digits-0.5/classifiers/erm/seed0: a classifier of the run without bias tells if synthetic images are right.
ifneq ($(JUDGE),)
ifneq ($(BIAS) $(filter erm,$(RECIPES)),0.5 erm)
$(JUDGE:/seed0=/config.json):
	+@$(MAKE) --no-print-directory BIAS=0.5 RECIPES=erm SEEDS=0 $@
endif
endif

# The other model seeds: the recipes that hang on them are made by a make of their own.
OTHER_SEEDS   = $(wordlist 2,99,$(MODEL_SEEDS))
DRAWN_RECIPES = $(foreach r,$(RECIPES),$(if $(call drawn,$(r)),$(r)))
of_seed       = $(DRAWN_RECIPES:%=$(call run_of,$(1))/classifiers/%/config.json)
define other_seed
$(call of_seed,$(1)) &: $(DATA)/config.json $(BASE_FILES) FORCE
	+@$(MAKE) --no-print-directory MODEL_SEEDS=$(1) $(call of_seed,$(1))
endef
$(foreach s,$(OTHER_SEEDS),$(eval $(call other_seed,$(s))))

# $(call classifiers,RECIPES): their folders, those of other model seeds included.
classifiers = $(1:%=$(RUN)/classifiers/%) $(foreach s,$(OTHER_SEEDS),\
	$(patsubst %,$(call run_of,$(s))/classifiers/%,$(filter $(DRAWN_RECIPES),$(1))))

$(eval $(call stage,images,evaluate_images.py --data $(DATA) --synthetic $(METHODS:%=$(RUN)/synthetic/%) \
	--clip $(CLIP) $(JUDGE:%=--judge %),$(RUN)/images,\
	cluster.py $(METHODS:%=$(RUN)/synthetic/%/config.json) \
	$(if $(JUDGE),train_classifier.py $(JUDGE:/seed0=/config.json))))

$(eval $(call stage,evaluate,evaluate.py --data $(DATA) --classifiers $(call classifiers,$(RECIPES)) \
	$(if $(METHODS),--synthetic $(METHODS:%=$(RUN)/synthetic/%) --images $(RUN)/images),$(RUN)/results,\
	$(addsuffix /config.json,$(call classifiers,$(RECIPES)) $(if $(METHODS),$(RUN)/images))))

$(foreach a,$(ABLATIONS),$(eval $(call stage,ablation-$(a),evaluate.py --data $(DATA) --keep-order \
	--references clustered --classifiers $(call classifiers,$($(a))),$(RUN)/ablations/$(a),\
	$(addsuffix /config.json,$(call classifiers,$($(a)))))))

$(eval $(call stage,ablation-synthetic,evaluate_images.py --data $(DATA) --synthetic $(METHODS:%=$(RUN)/synthetic/%) \
	--clip $(CLIP),$(RUN)/ablations/synthetic,cluster.py $(METHODS:%=$(RUN)/synthetic/%/config.json)))

$(RUN)/results/report.html: report.py $(RUN)/results/config.json $(wildcard $(RUN)/ablations/*/config.json)
	$(LAUNCH) $(PY) report.py --run $(RUN) --data $(DATA) --out $@
