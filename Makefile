# Clustered DreamBooth. `make` runs the experiment, `make help` lists targets and settings.
# ---- settings: the command line wins over data/<dataset>.mk, which wins over these --------------
DATASET      ?= $(if $(filter base,$(MAKECMDGOALS)),printed,digits)
-include data/$(DATASET).mk
LOADER       ?= $(DATASET)
BIAS         ?= 0.95
BIASES       ?= 0.5 0.8 0.9 0.95 0.99 0.995 1
RECIPES      ?= erm groupdro dfr vanilla lora dreambooth clustered
REFERENCES   ?= erm groupdro
SEEDS        ?= 0 1 2
MODEL_SEEDS  ?= 0
BASE         ?= base/miniature
NEW_BASE     ?= base/$(DATASET)
blank        := $(empty) $(empty)
# A base's own CLIP, also of one in base/ that is not trained yet, or that of Stable Diffusion 1.x.
clip         := $(or $(wildcard $(subst $(blank),\$(blank),$(BASE))/clip), \
  $(addsuffix /clip,$(filter base/%,$(BASE))),openai/clip-vit-large-patch14)
CLIP         ?= $(clip)
K            ?= auto
IMAGES       ?= 250
EPOCHS       ?= 30
KEEP_WEIGHTS ?= yes
CACHE        ?= yes
LAUNCH       ?=
PYTHON       ?= python3

# ---- generative methods: what is fine-tuned on which images; a new method is one line -----------
lora.finetune           = --method lora       --per group   --data $(DATA) $(LORA)
dreambooth.finetune     = --method dreambooth --per group   --data $(DATA) $(prior) $(DREAMBOOTH)
clustered.finetune      = --method dreambooth --per cluster --data $(RUN)/clusters $(prior) \
                          $(DREAMBOOTH) $(CLUSTERED)
clustered-lora.finetune = --method lora       --per cluster --data $(RUN)/clusters $(LORA)
compositional.finetune  = --method dreambooth --per dataset --data $(DATA) $(COMPOSITIONAL)
prior                   = --prior $(RUN)/synthetic/vanilla
clusters.cluster        = --k $(K)
named         = $(sort $(basename $(filter $1,$(.VARIABLES))))
include evaluation/experiments.mk
METHODS      := vanilla $(call named,%.finetune %.generate)
MORE_RECIPES := $(call named,%.recipe %.images)

# Two tools run at every make, also before the installation; they need no packages (-S).
PY       = .venv/bin/python
ANY_PY  := $(or $(wildcard $(PY)),$(PYTHON)) -S
# This one validates settings and gives each its one form (BIAS=.950 is 0.95); | is a blank.
quoted   = '$(subst ','\'',$1)'
SETTLED := $(shell $(ANY_PY) tools/settings.py settle $(call quoted,$(MAKEOVERRIDES)) $(foreach s, \
  DATASET BIAS BIASES RECIPES SEEDS MODEL_SEEDS KEEP_WEIGHTS CACHE MAKECMDGOALS METHODS \
  MORE_RECIPES,$(call quoted,$s=$($s))))
$(if $(filter ok,$(firstword $(SETTLED))),,$(error $(or $(SETTLED),tools/settings.py failed)))
$(foreach setting,$(wordlist 2,99,$(SETTLED)),$(eval override $(subst |, ,$(setting))))

# ---- the commands, in the order in which data flows; $1 is a method or a recipe -----------------
seed     = $(firstword $(MODEL_SEEDS))
DATA     = data/$(DATASET)-$(BIAS)
# Inside $(foreach seed,$(MODEL_SEEDS),...) $(seed), and with it $(RUN), is that of another run.
RUN      = runs/$(DATASET)-$(BIAS)$(patsubst %,-seed%,$(filter-out 0,$(seed)))
EMBEDDED = runs/$(DATASET)-$(BIAS)/embeddings
CACHED   = $(if $(filter no,$(CACHE)),--no-cache)
prepare  = data/prepare.py $(LOADER) --bias $(BIAS) $(if $(ROOT),--root "$(ROOT)") $(PREPARE)
embed    = data/embed.py --data $(DATA) --clip "$(CLIP)" $(CACHED) $(EMBED)
cluster  = cluster.py --data $(DATA) --embeddings $(EMBEDDED) --seed $(seed) $(CLUSTER) \
  $($1.cluster)
finetune = finetune.py --base "$(BASE)" --seed $(seed) $($1.finetune)
generate = generate.py --base "$(BASE)" --clip "$(CLIP)" --data $(DATA) --embeddings $(EMBEDDED) \
  --images $(IMAGES) --seed $(seed) $(GENERATE) $($1.generate) $(if $(models), \
  --models $(RUN)/models/$(models) $(if $(filter no,$(KEEP_WEIGHTS)),--drop-weights))
classify = train_classifier.py --data $(DATA) --seeds $(SEEDS) --epochs $(EPOCHS) $(CACHED) \
  $(CLASSIFIER) $($(method).classify) --recipe $(or $($(recipe).recipe),$(recipe)) \
  $(addprefix --synthetic $(RUN)/synthetic/,$(method))
evaluate = evaluate.py --no-print --data $(DATA) --classifiers $(call classifiers,$(RECIPES)) \
  --references $(REFERENCES) $(if $(PREDICTIONS),mine --mine "$(PREDICTIONS)" $(COLUMNS)) \
  $(if $(DRAWN),--synthetic $(DRAWN:%=$(RUN)/synthetic/%))
measure  = evaluation/images.py --data $(DATA) --embeddings $(EMBEDDED) --clip "$(CLIP)" $(CACHED) \
  --synthetic $(DRAWN:%=$(RUN)/synthetic/%)
# A recipe is one of train_classifier.py's (erm), a method (two-stage on its images), or one of
# each (filled+lora). A method without models of its own, clustered-alpha0, draws with clustered's.
method  = $(or $(filter $(METHODS),$(subst +, ,$1)),$($1.images))
recipe  = $(or $(filter-out $(METHODS),$(subst +, ,$1)),two-stage)
models  = $(firstword $(foreach m,$1 $(firstword $(subst -, ,$1)),$(if $($m.finetune),$m)))
DRAWN   = $(sort $(foreach r,$(RECIPES),$(call method,$r)))
GOALS   = $(RUN)/results $(if $(DRAWN),$(RUN)/images)
# Classifiers of recipes: in the runs of all model seeds, or in the first if they need no images.
classifiers = $(foreach seed,$(MODEL_SEEDS),$(foreach r,$1,$(if $(call method,$r)$(filter \
  $(seed),$(firstword $(MODEL_SEEDS))),$(RUN)/classifiers/$r)))
# ---- the stages ---------------------------------------------------------------------------------
# $(call rule,FOLDER,COMMAND) defines how a folder is made. It is made again when the script, shared
# code or a folder among the command's flags is newer, or when it is STALE (common/made.py). PLAN
# lists all folders with their commands, for tools/plan.py.
define stage
PLAN += $(subst $(hash),\$(hash),$(call quoted,$1 $(call once,$2)))
$1/config.json: export LOGS = $(RUN)/logs
$1/config.json: $(firstword $2) $(SHARED) \
  $(addsuffix /config.json,$(filter-out $(FILES),$(filter data/$(DATASET)-% runs/%,$2)))
	$$(RUNNER) $(call once,$2) --out $1

endef
rule    = $(eval $(call stage,$1,$2))
once    = $(subst $$,$$$$,$(strip $1))
hash   := \#
# Settings may name files below runs/, which have no config.json.
FILES   = %.csv %.safetensors %.pth %.pt
SHARED := $(filter-out base/pretrain.py,$(wildcard common/*.py base/*.py classifiers/*.py))
RUNNER  = $(LAUNCH) $(if $(filter accelerate torchrun,$(notdir $(LAUNCH))),,$(PY))
# accelerate starts the first Python in PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# On a CPU: by default glibc returns memory to the kernel and asks for it again at every step, which
# takes up to a third of a classifier's time. 32 MB is the threshold that glibc itself rises to.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 268435456
$(call rule,$(DATA),$(prepare))
$(call rule,$(EMBEDDED),$(embed))
$(foreach seed,$(MODEL_SEEDS), \
  $(foreach c,$(call named,%.cluster),$(call rule,$(RUN)/$c,$(call cluster,$c))) \
  $(foreach m,$(METHODS),$(if $($m.finetune),$(call rule,$(RUN)/models/$m,$(call finetune,$m)))) \
  $(foreach m,$(METHODS),$(call rule,$(RUN)/synthetic/$m,$(call generate,$m))) \
  $(foreach r,$(RECIPES),$(call rule,$(RUN)/classifiers/$r,$(call classify,$r))))
$(call rule,$(RUN)/results,$(evaluate))
$(foreach folder,images ablations/synthetic,$(call rule,$(RUN)/$(folder),$(measure)))
$(foreach a,$(ABLATIONS),$(call rule,$(RUN)/ablations/$a,$(call ablation,$a)))
$(call rule,$(RUN)/failures,$(failures))
$(DATA)/config.json: data/__init__.py data/$(LOADER).py | $(RUN)/.checked
$(foreach f,results failures $(ABLATIONS:%=ablations/%),$(RUN)/$f/config.json): \
  $(wildcard evaluation/*.py)
$(RUN)/failures/config.json: cluster.py $(wildcard evaluation/*.html)
$(RUN)/images/config.json: | $(RUN)/results/config.json # results come first, whatever happens here
$(RUN)/results/report.html: $(wildcard evaluation/*.html evaluation/report.py \
  $(RUN)/ablations/*/config.json) $(GOALS:%=%/config.json)
	$(PY) evaluation/report.py --run $(RUN) --data $(DATA) --out $@
base: $(DATA)/config.json
	$(PY) base/pretrain.py --data $(DATA) $(PRETRAIN) $(CACHED) --out $(NEW_BASE)
results: $(RUN)/results/config.json
ablations: $(foreach a,$(ABLATIONS) synthetic,$(RUN)/ablations/$a/config.json)
failures: $(RUN)/failures/config.json
# Dropped weights are trained again only when they are needed.
.SECONDARY: $(foreach seed,$(MODEL_SEEDS),$(METHODS:%=$(RUN)/models/%/config.json))
$(if $(filter no,$(KEEP_WEIGHTS)),$(foreach m,$(DRAWN),$(if $(filter-out $m,$(call models,$m)), \
  $(error KEEP_WEIGHTS=no: $m needs the weights of $(call models,$m), use KEEP_WEIGHTS=yes))))

# Every command is parsed before the first one runs: a wrong flag is reported now, not after hours.
STALE := $(shell $(ANY_PY) tools/plan.py stale '$(MAKECMDGOALS)' $(RUN)/.checked $(PLAN))
$(STALE): FORCE
$(RUN)/.checked: | .venv/installed
	$(if $(dry),,@$(PY) tools/plan.py check $@ '$(GOALS) $(asked)' $(PLAN))
asked := $(addprefix $(RUN)/,$(filter failures,$(MAKECMDGOALS)))
dry   := $(findstring n,$(filter-out -%,$(firstword $(MAKEFLAGS))))

# ---- what you type ------------------------------------------------------------------------------
.DEFAULT_GOAL := all
all: $(RUN)/results/report.html
	$(if $(dry),,@cat $(RUN)/results/results.md $(if $(DRAWN),$(RUN)/images/images.md))
	$(if $(dry),,@echo "Report: $<")
test torture test-slurm: export OMP_NUM_THREADS = 1
test torture: .venv/installed
	$(if $(filter torture,$@),TORTURE=1) $(PY) -m pytest -q -n auto --dist loadfile --durations 15 \
	  tests
test-slurm: .venv/installed
	TEST_SLURM=1 $(PY) -m pytest -q -s -rs --durations 0 tests/test_slurm.py
status: export LOGS = $(RUN)/logs
status: ; @$(ANY_PY) tools/plan.py status '$(GOALS)' $(PLAN)
help:
	@$(ANY_PY) tools/settings.py help \
	  $(foreach s,$(shell sed -n 's/^\([A-Z_]*\) *?=.*/\1/p' Makefile),$(call quoted,$s=$($s)))
clean: ; rm -rf $(foreach seed,$(MODEL_SEEDS),$(RUN))
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt && touch $@
.PHONY: all results base bench sweep paper ablate dryrun failures test torture test-slurm status \
  help clean FORCE
.DELETE_ON_ERROR:
