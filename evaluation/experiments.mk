# Recipes and experiments beside those of a plain `make`.
# ---- recipes of train_classifier.py on images of a method (.images), or with flags (.recipe) ----
ffr.images          = vanilla
ffr-groupdro.images = vanilla
sage.images         = tokens
dfr.recipe          = dfr $(if $(filter erm,$(RECIPES)),--erm $(RUN)/classifiers/erm)
$(foreach beta,1 0.9 0.1,$(eval beta$(beta).recipe = two-stage --beta $(beta)))
# Real images edited by the base model, instead of images drawn from noise.
EDITED ?= --edit --steps 20 --keep 1 --rare own
vanilla-edited.generate = $(EDITED)
# ---- without attribute labels: groups are the pseudo-groups of cluster.py, DATA's only test -----
# tokens (of sage, Luo et al. 2026): one LoRA with a learned word for each pseudo-group; one-free:
# one DreamBooth; clustered-free: a DreamBooth for each pseudo-group; vanilla-free: the base model;
# tokens-edited: real images edited from the word of one pseudo-group to that of another.
PSEUDO ?= --within dataset
TOKENS ?= --steps 300 --balance 0.25 --merge-above 0.85
ON_PSEUDO = vanilla-free tokens one-free clustered-free
pseudo.cluster          = --clip "$(CLIP)" $(PSEUDO)
tokens.finetune         = --method lora --per dataset --learn-identifiers --data $(RUN)/pseudo \
                          $(LORA) $(TOKENS)
one-free.finetune       = --method dreambooth --per dataset --learn-identifiers \
                          --data $(RUN)/pseudo $(COMPOSITIONAL)
clustered-free.finetune = --method dreambooth --per group --data $(RUN)/pseudo \
                          --prior $(RUN)/synthetic/vanilla-free $(DREAMBOOTH)
$(foreach m,$(ON_PSEUDO),$(eval $m.generate = --data $$(RUN)/pseudo --val-share 0.25 --rare own))
tokens-edited.generate  = --data $(RUN)/pseudo $(EDITED)
$(foreach m,$(ON_PSEUDO) tokens-edited,$(eval $m.classify = --groups $$(RUN)/pseudo))
$(foreach r,erm jtt groupdro dfr,$(eval $r-free.recipe = $r --groups $$(RUN)/pseudo))
sage.recipe             = sage --val synthetic
dfr-synthetic.recipe    = two-stage-dfr --val synthetic

# ---- where a classifier fails: your own, by a csv of predictions, or erm's -----------------------
failures     = evaluation/failures.py --data $(DATA) --embeddings $(EMBEDDED) --clip "$(CLIP)" \
               $(if $(findstring --weights,$(FAILURES)),,--predictions $(predicted)) \
               $(COLUMNS) $(CACHED) $(FAILURES)
predicted    = $(if $(PREDICTIONS),"$(PREDICTIONS)",$(RUN)/classifiers/$(firstword \
               $(filter erm erm-free,$(RECIPES)) erm))
# ---- several runs -------------------------------------------------------------------------------
each_bias  = +@$(foreach BIAS,$1,$(MAKE) --no-print-directory BIAS=$(BIAS) $2 &&) true
results_of = --results $(foreach BIAS,$1,$(RUN)/results)
sweep:
	$(call each_bias,$(BIASES),results)
	$(PY) evaluation/sweep.py $(call results_of,$(BIASES)) --out runs/$(DATASET)-sweep
# At the severe bias also rare groups that are drawn by the models of common ones.
PAPER_BIASES  ?= 0.95 0.99
PAPER_RECIPES ?= erm groupdro self dfr ffr vanilla lora dreambooth clustered compositional \
                 vanilla-edited
PAPER_SEEDS   ?= 0 1 2
PAPER_SEVERE  ?= dreambooth-transfer clustered-transfer
SEVERE         = $(lastword $(PAPER_BIASES))
PAPER          = SEEDS="0 1 2 3 4" MODEL_SEEDS="$(PAPER_SEEDS)" \
                 REFERENCES="erm groupdro vanilla dreambooth" RECIPES="$(PAPER_RECIPES) $1"
paper:
	$(call each_bias,$(filter-out $(SEVERE),$(PAPER_BIASES)),$(call PAPER))
	$(call each_bias,$(SEVERE),$(call PAPER,$(PAPER_SEVERE)))
	$(PY) evaluation/paper.py $(call results_of,$(PAPER_BIASES)) --out runs/$(DATASET)-paper

# ---- make ablate: recipes that differ in one setting; a table and a figure for each setting -----
ABLATIONS        ?= clusters filter beta images second-stage prior rare
clusters.of       = clustered-k1 clustered-k2 clustered-k5 clustered-k10 clustered-k5-rare clustered
filter.of         = clustered-alpha0 clustered clustered-alpha1 clustered-random
beta.of           = beta1+clustered beta0.9+clustered clustered beta0.1+clustered
images.of         = clustered-images50 clustered-images100 clustered clustered-images500
second-stage.of   = clustered synthetic+clustered two-stage-whole+clustered
prior.of          = clustered clustered-no-prior
rare.of           = $(foreach m,lora dreambooth clustered,$m-own $m-transfer $m-shared)
ablation          = evaluate.py --data $(DATA) --keep-order --references clustered \
                    --classifiers $(call classifiers,$($1.of))
# Other clusters, with models of their own.
$(foreach k,1 2 5 10,$(eval clusters-k$k.cluster = --k $k))
clusters-k5-rare.cluster    = --k 5 --min-size 5
$(foreach k,k1 k2 k5 k10 k5-rare,$(eval clustered-$k.finetune = \
  $$(subst $$(RUN)/clusters,$$(RUN)/clusters-$k,$$(clustered.finetune))))
clustered-no-prior.finetune = $(subst $(prior),,$(clustered.finetune))
# Other images, of the models of clustered (dreambooth, lora).
$(foreach m,lora dreambooth clustered,$(foreach r,own transfer shared, \
  $(eval $m-$r.generate = --rare $r)))
$(foreach n,50 100 500,$(eval clustered-images$n.generate = --images $n))
clustered-alpha0.generate   = --alpha 0
clustered-alpha1.generate   = --alpha 1
clustered-random.generate   = --keep 1
ablate:
	+@$(MAKE) --no-print-directory KEEP_WEIGHTS=yes ablations \
	  RECIPES='$(sort $(foreach a,$(ABLATIONS),$($a.of)))'
	@echo "Tables and figures: $(RUN)/ablations/*/{results.md,worst_group.png}"

# ---- tools --------------------------------------------------------------------------------------
dryrun: .venv/installed
	$(PY) tools/dryrun.py --dataset $(DATASET) --bias $(BIAS) --model-seeds $(words $(MODEL_SEEDS)) \
	  $(DRYRUN) --out runs/dryrun-$(DATASET) --plan '$(GOALS)' $(PLAN)
bench: .venv/installed # with `+` each row is shown when it is measured, despite --output-sync
	+$(if $(dry),@: )$(PY) tools/bench.py $(BENCH) --out runs/bench
