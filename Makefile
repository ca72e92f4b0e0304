# Clustered DreamBooth. `make` runs the experiment, `make help` lists targets and settings, `make -n` shows what would run.
# ---- settings: the command line wins over data/<dataset>.mk, which wins over these -----------------------------
DATASET      ?= digits
-include data/$(DATASET).mk
LOADER       ?= $(DATASET)
BIAS         ?= 0.95
BIASES       ?= 0.5 0.8 0.9 0.95 0.99 0.995 1
RECIPES      ?= erm groupdro vanilla lora dreambooth clustered
REFERENCES   ?= erm groupdro
SEEDS        ?= 0 1 2
MODEL_SEEDS  ?= 0
BASE         ?= base/miniature
CLIP         ?= $(BASE)/clip
K            ?= auto
MODES        ?= auto
IMAGES       ?= 250
EPOCHS       ?= 30
SHARDS       ?= 1
KEEP_WEIGHTS ?= yes
CACHE        ?= yes
PYTHON       ?= python3
# Further flags of a stage: PREPARE PRETRAIN EMBED CLUSTER LORA DREAMBOOTH CLUSTERED COMPOSITIONAL GENERATE CLASSIFIER.
# Validated and normalised (BIAS=.950 becomes 0.95) before anything runs. STALE: folders whose files or inputs changed.
quoted   = '$(subst ','\'',$1)'
SETTLED := $(shell $(PYTHON) common/make.py settings $(call quoted,$(MAKEOVERRIDES)) $(foreach s,DATASET BIAS BIASES \
  RECIPES SEEDS MODEL_SEEDS SHARDS KEEP_WEIGHTS CACHE MAKECMDGOALS,$(call quoted,$s=$($s))))
$(if $(filter ok,$(firstword $(SETTLED))),,$(error $(or $(SETTLED),$(PYTHON) common/make.py failed)))
$(foreach setting,$(wordlist 2,99,$(SETTLED)),$(eval override $(subst |, ,$(setting))))

# ---- generative methods: what is fine-tuned on which images; a new method is one line ---------------------------
lora.finetune           = --method lora       --per group   --data $(DATA) $(LORA)
dreambooth.finetune     = --method dreambooth --per group   --data $(DATA) $(prior) $(DREAMBOOTH)
clustered.finetune      = --method dreambooth --per cluster --data $(RUN)/clusters $(prior) $(DREAMBOOTH) $(CLUSTERED)
clustered-lora.finetune = --method lora       --per cluster --data $(RUN)/clusters $(LORA)
one-model.finetune      = --method dreambooth --per dataset --data $(DATA) $(COMPOSITIONAL)
compositional.finetune  = --method dreambooth --per dataset --data $(RUN)/modes $(COMPOSITIONAL)
prior                   = --prior $(RUN)/synthetic/vanilla
clusters.cluster        = --k $(K)
modes.cluster           = --within class --k $(MODES)

# ---- the commands, in the order in which data flows; $1 is a method or a recipe ---------------------------------
PY       = .venv/bin/python
DATA     = data/$(DATASET)-$(BIAS)
RUN      = $(call run_of,$(firstword $(MODEL_SEEDS)))
run_of   = runs/$(DATASET)-$(BIAS)$(patsubst %,-seed%,$(filter-out 0,$1))
SEED     = --seed $(firstword $(MODEL_SEEDS))
CACHED   = $(if $(filter no,$(CACHE)),--no-cache)
EMBEDDED = runs/$(DATASET)-$(BIAS)/embeddings
prepare  = data/prepare.py $(LOADER) --bias $(BIAS) $(if $(ROOT),--root "$(ROOT)") $(PREPARE)
embed    = data/embed.py --data $(DATA) --clip "$(CLIP)" $(CACHED) $(EMBED)
cluster  = cluster.py --data $(DATA) --embeddings $(EMBEDDED) $(SEED) $(CLUSTER) $($1.cluster)
finetune = finetune.py --base "$(BASE)" $(SEED) $($1.finetune)
generate = generate.py --base "$(BASE)" --clip "$(CLIP)" --data $(DATA) --embeddings $(EMBEDDED) --images $(IMAGES) $(SEED) \
  $(GENERATE) $($1.generate) \
  $(if $($1.finetune),--models $(RUN)/models/$1 $(if $(filter no,$(KEEP_WEIGHTS)),--drop-weights))
classify = train_classifier.py --data $(DATA) --seeds $(SEEDS) --epochs $(EPOCHS) $(CACHED) $(CLASSIFIER) \
  $($(method).classify) --recipe $(or $($(recipe).recipe),$(recipe)) $(addprefix --synthetic $(RUN)/synthetic/,$(method))
measure  = evaluation/images.py --data $(DATA) --embeddings $(EMBEDDED) --clip "$(CLIP)" $(CACHED) \
  --synthetic $(DRAWN:%=$(RUN)/synthetic/%)
evaluate = evaluate.py --no-print --data $(DATA) --classifiers $(call classifiers,$(RECIPES)) --references $(REFERENCES) \
  $(if $(DRAWN),--synthetic $(DRAWN:%=$(RUN)/synthetic/%))
# A recipe is one of train_classifier.py's (erm), a method (two-stage on its images), or one of each (filled+lora).
method  = $(or $(filter $(METHODS),$(subst +, ,$1)),$($1.images))
recipe  = $(or $(filter-out $(METHODS),$(subst +, ,$1)),two-stage)
METHODS = vanilla $(sort $(basename $(filter %.finetune %.generate,$(.VARIABLES))))
DRAWN   = $(sort $(foreach r,$(RECIPES),$(call method,$r)))

# ---- the stages: a folder is made by its command, and made again when what it needs has changed -----------------
# (its script, shared code, the folders among its flags, or the command). $$ delays expansion until $*, its name, is known.
needs = $(firstword $1) $(filter-out common/make.py common/on_gpu.py,$(wildcard common/*.py)) $(call other,$1) \
  $(addsuffix /config.json,$(filter data/$(DATASET)-% runs/%,$1))
other = $(if $(subst |$(strip $1)|,,|$(strip $(file <$(@D)/command))|),FORCE)
define run
$(if $(filter-out 1,$(SHARDS)),$(if $(filter $(SHARDED),$1),trap 'kill $$(jobs -p)' INT TERM; \
  for i in $$(seq 0 $$(($(SHARDS) - 1))); do $(LAUNCH) $(PY) $(strip $1) --out $(@D) --shard $$i/$(SHARDS) & done; wait))
$(LAUNCH) $(PY) $(strip $1) --out $(@D)
$(if $(dry),,@printf '%s\n' $(call quoted,$(strip $1)) > $(@D)/command)
endef
dry  := $(findstring n,$(filter-out -%,$(firstword $(MAKEFLAGS))))
.SECONDEXPANSION:
include evaluation/experiments.mk
$(DATA)/config.json: $$(call needs,$$(prepare)) | $(RUN)/.checked
	$(call run,$(prepare))
$(EMBEDDED)/config.json: $$(call needs,$$(embed))
	$(call run,$(embed))
$(foreach c,clusters modes pseudo,$(RUN)/$c/config.json): $$(call needs,$$(call cluster,$$(notdir $$(@D))))
	$(call run,$(call cluster,$(notdir $(@D))))
$(METHODS:%=$(RUN)/models/%/config.json): $(RUN)/models/%/config.json: $$(call needs,$$(call finetune,$$*))
	$(call run,$(call finetune,$*))
$(METHODS:%=$(RUN)/synthetic/%/config.json): $(RUN)/synthetic/%/config.json: $$(call needs,$$(call generate,$$*))
	$(call run,$(call generate,$*))
$(RECIPES:%=$(RUN)/classifiers/%/config.json): $(RUN)/classifiers/%/config.json: $$(call needs,$$(call classify,$$*))
	$(call run,$(call classify,$*))
$(RUN)/images/config.json: $$(call needs,$$(measure)) | $(RUN)/results/config.json # results come first, whatever happens here
	$(call run,$(measure))
$(RUN)/results/config.json: evaluation/figures.py evaluation/intervals.py $$(call needs,$$(evaluate))
	$(call run,$(evaluate))
$(RUN)/results/report.html: $(wildcard evaluation/report.* evaluation/page.html) $(RUN)/results/config.json \
  $(if $(DRAWN),$(RUN)/images/config.json) $(if $(shell \
  find $(RUN)/ablations -name config.json -newer $(RUN)/results/report.html 2>/dev/null),FORCE)
	$(LAUNCH) $(PY) evaluation/report.py --run $(RUN) --data $(DATA) --out $@
$(STALE:%=%/config.json): FORCE
.SECONDARY: $(METHODS:%=$(RUN)/models/%/config.json) # dropped weights are trained again only when they are needed
# MODEL_SEEDS="0 1": seed 1 has a run of its own, runs/<run>-seed1, made by a make of its own, as far as recipes depend on it.
OTHERS      = $(wordlist 2,99,$(MODEL_SEEDS))
theirs      = $(foreach r,$(RECIPES),$(if $(call method,$r),$(call run_of,$1)/classifiers/$r))
classifiers = $(1:%=$(RUN)/classifiers/%) $(foreach s,$(OTHERS),$(foreach r,$1,$(filter %/classifiers/$r,$(call theirs,$s))))
$(foreach s,$(OTHERS),$(eval $(addsuffix /config.json,$(call theirs,$s)) &: \
  $(addsuffix /config.json,$(call theirs,$(firstword $(MODEL_SEEDS)))) FORCE; \
  +@$$(MAKE) --no-print-directory MODEL_SEEDS=$s $$(addsuffix /config.json,$$(call theirs,$s))))
# Every command is parsed before the first one runs: a wrong flag is reported now, not after hours of fine-tuning.
COMMANDS = $(prepare) @@ $(embed) $(foreach c,clusters pseudo,@@ $(call cluster,$c)) @@ $(evaluate) $(if $(DRAWN),@@ $(measure)) \
  $(foreach m,$(DRAWN),@@ $(call generate,$m) $(if $($m.finetune),@@ $(call finetune,$m))) $(foreach r,$(RECIPES),@@ $(call classify,$r))
$(RUN)/.checked: $(if $(subst |$(strip $(COMMANDS))|,,|$(strip $(file <$(RUN)/.checked))|),FORCE) | .venv/installed
	$(if $(dry),,@$(PY) common/make.py check $@ $(call quoted,$(strip $(COMMANDS))))

# ---- what you type ----------------------------------------------------------------------------------------------
.DEFAULT_GOAL := all
all: $(RUN)/results/report.html
	$(if $(dry),,@cat $(RUN)/results/results.md $(if $(DRAWN),$(RUN)/images/images.md) && echo "Report: $<")
test torture: .venv/installed
	$(if $(filter torture,$@),TORTURE=1) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --durations 15 tests
status: ; @LOGS=$(RUN)/logs $(PYTHON) common/make.py status $(sort $(filter data/$(DATASET)-% runs/%,$(COMMANDS)) $(RUN)/results)
help: ; @$(PYTHON) common/make.py help $(foreach s,$(shell sed -n 's/^\([A-Z_]*\) *?=.*/\1/p' Makefile),$(call quoted,$s=$($s)))
clean: ; rm -rf $(RUN)
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt && touch $@
.PHONY: all base bench sweep paper ablate dryrun failures test torture test-slurm status help clean FORCE
.DELETE_ON_ERROR:
