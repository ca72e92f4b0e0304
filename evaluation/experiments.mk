# How commands run. GPUS=8: each gets a GPU of its own among the first 8. SHARDED: these take --shard. Each keeps a log in LOGS.
LAUNCH ?= $(if $(GPUS),$(PYTHON) common/on_gpu.py $(GPUS))
SHARDED = data/embed.py finetune.py generate.py train_classifier.py
runs/% data/$(DATASET)-%: export LOGS = $(RUN)/logs
test-slurm: .venv/installed
	TEST_SLURM=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -s -rs --durations 0 tests/test_slurm.py

# Recipes of train_classifier.py that have images of their own.
ffr.images          = vanilla
ffr-groupdro.images = vanilla
sage.images         = tokens

# Experiments of several runs, or of more recipes.
sweep:
	+@$(foreach BIAS,$(BIASES),$(MAKE) --no-print-directory BIAS=$(BIAS) $(RUN)/results/config.json &&) true
	$(PY) evaluation/sweep.py --results $(foreach BIAS,$(BIASES),$(RUN)/results) --out runs/$(DATASET)-sweep

# `make paper` runs the paper's recipes and ours at two biases, with five classifier seeds and three of everything before;
# at the severe one also rare groups that are drawn by the models of common ones.
PAPER_BIASES  ?= 0.95 0.99
PAPER_RECIPES ?= erm groupdro self dfr ffr vanilla lora dreambooth clustered compositional
PAPER_SEEDS   ?= 0 1 2
PAPER_SEVERE  ?= dreambooth-transfer clustered-transfer
paper:
	+@$(foreach BIAS,$(PAPER_BIASES),$(MAKE) --no-print-directory BIAS=$(BIAS) RECIPES="$(PAPER_RECIPES) $(if \
	  $(filter $(lastword $(PAPER_BIASES)),$(BIAS)),$(PAPER_SEVERE))" SEEDS="0 1 2 3 4" \
	  MODEL_SEEDS="$(PAPER_SEEDS)" REFERENCES="erm groupdro vanilla dreambooth" &&) true
	$(PY) evaluation/paper.py --results $(foreach BIAS,$(PAPER_BIASES),$(RUN)/results) --out runs/$(DATASET)-paper

# Without attribute labels: the groups are the pseudo-groups of cluster.py, and an attribute that DATA has serves only to test.
# sage (Luo et al. 2026) and tokens use images of one LoRA with a learned word for each pseudo-group, one-free those of one
# DreamBooth, clustered-free those of a DreamBooth for each pseudo-group, vanilla-free those of the base model.
PSEUDO ?= --within dataset
TOKENS ?= --steps 300 --balance 0.25 --merge-above 0.85
FREE      = --groups $(RUN)/pseudo
on-pseudo = --data $(RUN)/pseudo --val-share 0.25 --rare own
pseudo.cluster          = --as-attribute --clip "$(CLIP)" $(PSEUDO)
tokens.finetune         = --method lora --per dataset --learn-identifiers --data $(RUN)/pseudo $(LORA) $(TOKENS)
one-free.finetune       = --method dreambooth --per dataset --learn-identifiers --data $(RUN)/pseudo $(COMPOSITIONAL)
clustered-free.finetune = --method dreambooth --per group --data $(RUN)/pseudo --prior $(RUN)/synthetic/vanilla-free $(DREAMBOOTH)
vanilla-free.generate   = $(on-pseudo)
tokens.generate         = $(on-pseudo)
one-free.generate       = $(on-pseudo)
clustered-free.generate = $(on-pseudo)
vanilla-free.classify   = $(FREE)
tokens.classify         = $(FREE)
one-free.classify       = $(FREE)
clustered-free.classify = $(FREE)
erm-free.recipe         = erm $(FREE)
jtt-free.recipe         = jtt $(FREE)
groupdro-free.recipe    = groupdro $(FREE)
dfr-free.recipe         = dfr $(FREE)
sage.recipe             = sage --val synthetic
dfr-synthetic.recipe    = two-stage-dfr --val synthetic

# What is wrong with a classifier: PREDICTIONS is a csv with file_name and prediction, or a folder of train_classifier.py.
PREDICTIONS ?= $(RUN)/classifiers/erm
failed = evaluation/failures.py --data $(DATA) --embeddings $(EMBEDDED) --clip "$(CLIP)" --predictions $(PREDICTIONS) $(FAILURES)
$(RUN)/failures/config.json: evaluation/failures.html evaluation/page.html $$(call needs,$$(failed))
	$(call run,$(failed))
failures: $(RUN)/failures/config.json

# `make dryrun` tells what a run will cost on this machine: one unit of every stage, on random images and models.
dryrun: .venv/installed
	$(LAUNCH) $(PY) evaluation/dryrun.py --dataset $(DATASET) --bias $(BIAS) --model-seeds $(words $(MODEL_SEEDS)) \
	  --commands $(call quoted,$(strip $(COMMANDS))) $(DRYRUN) --out runs/dryrun-$(DATASET)

# `make ablate` compares recipes that differ in one setting: a table and a figure each.
ABLATIONS        ?= clusters filter beta images second-stage prior rare
clusters.of       = clustered-k1 clustered-k2 clustered-k5 clustered-k10 clustered-k5-rare clustered
filter.of         = clustered-alpha0 clustered clustered-alpha1 clustered-random clustered-threshold
beta.of           = beta1+clustered beta0.9+clustered clustered beta0.1+clustered
images.of         = clustered-images50 clustered-images100 clustered clustered-images500
second-stage.of   = clustered two-stage-whole+clustered
prior.of          = clustered clustered-no-prior
rare.of           = $(foreach m,lora dreambooth clustered,$m-own $m-transfer)

# Other clusters, and models of them.
clusters-k1.cluster      = --k 1
clusters-k2.cluster      = --k 2
clusters-k5.cluster      = --k 5
clusters-k10.cluster     = --k 10
clusters-k5-rare.cluster = --k 5 --min-size 5
on = $(subst $(RUN)/clusters,$(RUN)/$1,$(clustered.finetune))
clustered-k1.finetune       = $(call on,clusters-k1)
clustered-k2.finetune       = $(call on,clusters-k2)
clustered-k5.finetune       = $(call on,clusters-k5)
clustered-k10.finetune      = $(call on,clusters-k10)
clustered-k5-rare.finetune  = $(call on,clusters-k5-rare)
clustered-no-prior.finetune = $(subst $(prior),,$(clustered.finetune))

# Rare groups drawn by models of their own, or by those of the common group of their class, whatever their size.
lora-own.generate            = --rare own --models $(RUN)/models/lora
lora-transfer.generate       = --rare transfer --models $(RUN)/models/lora
dreambooth-own.generate      = --rare own --models $(RUN)/models/dreambooth
dreambooth-transfer.generate = --rare transfer --models $(RUN)/models/dreambooth
clustered-own.generate       = --rare own --models $(RUN)/models/clustered
clustered-transfer.generate  = --rare transfer --models $(RUN)/models/clustered

# Other images of clustered's models.
clustered-alpha0.generate    = --alpha 0 --models $(RUN)/models/clustered
clustered-alpha1.generate    = --alpha 1 --models $(RUN)/models/clustered
clustered-random.generate    = --keep 1 --models $(RUN)/models/clustered
clustered-threshold.generate = --clip-threshold 0.1 --models $(RUN)/models/clustered
clustered-images50.generate  = --images 50 --models $(RUN)/models/clustered
clustered-images100.generate = --images 100 --models $(RUN)/models/clustered
clustered-images500.generate = --images 500 --models $(RUN)/models/clustered

# Another weight of cross-entropy against the contrastive loss; 1: cross-entropy alone.
beta1.recipe   = two-stage --beta 1
beta0.9.recipe = two-stage --beta 0.9
beta0.1.recipe = two-stage --beta 0.1

ablation = evaluate.py --data $(DATA) --keep-order --references clustered --classifiers $(call classifiers,$($1.of))
$(addprefix $(RUN)/clusters-,$(addsuffix /config.json,k1 k2 k5 k10 k5-rare)): $(RUN)/%/config.json: $$(call needs,$$(call cluster,$$*))
	$(call run,$(call cluster,$*))
$(ABLATIONS:%=$(RUN)/ablations/%/config.json): $(RUN)/ablations/%/config.json: evaluation/figures.py evaluation/intervals.py \
  $$(call needs,$$(call ablation,$$*))
	$(call run,$(call ablation,$*))
$(RUN)/ablations/synthetic/config.json: $$(call needs,$$(measure))
	$(call run,$(measure))
ablations: $(ABLATIONS:%=$(RUN)/ablations/%/config.json) $(RUN)/ablations/synthetic/config.json
ablate:
	+@$(MAKE) --no-print-directory KEEP_WEIGHTS=yes RECIPES='$(sort $(foreach a,$(ABLATIONS),$($a.of)))' ablations
	@echo "Tables and figures: $(RUN)/ablations/*/results.md $(RUN)/ablations/*/worst_group.png"

# `make bench` measures our scripts beside what one would run instead; BENCH holds its flags, such as --peers. With the `+`
# each row is shown once it is measured, whatever --output-sync says.
bench: .venv/installed
	+$(if $(dry),@: )$(PY) evaluation/bench.py $(BENCH) --out runs/bench
