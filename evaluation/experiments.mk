# Recipes and experiments beside those of a plain `make`.
# ---- recipes of train_classifier.py on images of a method (.images), or with flags (.recipe) ----
ffr.images          = vanilla
ffr-groupdro.images = vanilla
sage.images         = tokens
beta1.recipe        = two-stage --beta 1
beta0.9.recipe      = two-stage --beta 0.9
beta0.1.recipe      = two-stage --beta 0.1

# ---- without attribute labels: groups are the pseudo-groups of cluster.py, DATA's only test -----
# sage (Luo et al. 2026) and tokens use images of one LoRA with a learned word for each
# pseudo-group, one-free those of one DreamBooth, clustered-free those of a DreamBooth for each
# pseudo-group, vanilla-free those of the base model.
PSEUDO ?= --within dataset
TOKENS ?= --steps 300 --balance 0.25 --merge-above 0.85
ON_PSEUDO = vanilla-free tokens one-free clustered-free
pseudo.cluster          = --as-attribute --clip "$(CLIP)" $(PSEUDO)
tokens.finetune         = --method lora --per dataset --learn-identifiers --data $(RUN)/pseudo \
                          $(LORA) $(TOKENS)
one-free.finetune       = --method dreambooth --per dataset --learn-identifiers \
                          --data $(RUN)/pseudo $(COMPOSITIONAL)
clustered-free.finetune = --method dreambooth --per group --data $(RUN)/pseudo \
                          --prior $(RUN)/synthetic/vanilla-free $(DREAMBOOTH)
$(foreach m,$(ON_PSEUDO),$(eval $m.generate = --data $$(RUN)/pseudo --val-share 0.25 --rare own))
$(foreach m,$(ON_PSEUDO),$(eval $m.classify = --groups $$(RUN)/pseudo))
$(foreach r,erm jtt groupdro dfr,$(eval $r-free.recipe = $r --groups $$(RUN)/pseudo))
sage.recipe             = sage --val synthetic
dfr-synthetic.recipe    = two-stage-dfr --val synthetic

# ---- what is wrong with a classifier: PREDICTIONS is a csv with file_name and prediction, or a
# folder of train_classifier.py -------------------------------------------------------------------
PREDICTIONS ?= $(RUN)/classifiers/erm
failures     = evaluation/failures.py --data $(DATA) --embeddings $(EMBEDDED) --clip "$(CLIP)" \
               --predictions $(PREDICTIONS) $(FAILURES)

# ---- several runs -------------------------------------------------------------------------------
sweep:
	+@$(foreach BIAS,$(BIASES),$(MAKE) --no-print-directory BIAS=$(BIAS) \
	  $(RUN)/results/config.json &&) true
	$(PY) evaluation/sweep.py $(call results_of,$(BIASES)) --out runs/$(DATASET)-sweep
results_of = --results $(foreach BIAS,$1,$(RUN)/results)

# The paper's recipes and ours at two biases, with five classifier seeds and three of everything
# before; at the severe one also rare groups that are drawn by the models of common ones.
PAPER_BIASES  ?= 0.95 0.99
PAPER_RECIPES ?= erm groupdro self dfr ffr vanilla lora dreambooth clustered compositional
PAPER_SEEDS   ?= 0 1 2
PAPER_SEVERE  ?= dreambooth-transfer clustered-transfer
paper:
	+@$(foreach BIAS,$(PAPER_BIASES),$(MAKE) --no-print-directory BIAS=$(BIAS) \
	  RECIPES="$(PAPER_RECIPES) $(if $(filter $(lastword $(PAPER_BIASES)),$(BIAS)),$(PAPER_SEVERE))" \
	  SEEDS="0 1 2 3 4" MODEL_SEEDS="$(PAPER_SEEDS)" \
	  REFERENCES="erm groupdro vanilla dreambooth" &&) true
	$(PY) evaluation/paper.py $(call results_of,$(PAPER_BIASES)) --out runs/$(DATASET)-paper

# ---- make ablate: recipes that differ in one setting; a table and a figure for each setting -----
ABLATIONS        ?= clusters filter beta images second-stage prior rare
clusters.of       = clustered-k1 clustered-k2 clustered-k5 clustered-k10 clustered-k5-rare clustered
filter.of         = clustered-alpha0 clustered clustered-alpha1 clustered-random
beta.of           = beta1+clustered beta0.9+clustered clustered beta0.1+clustered
images.of         = clustered-images50 clustered-images100 clustered clustered-images500
second-stage.of   = clustered two-stage-whole+clustered
prior.of          = clustered clustered-no-prior
rare.of           = $(foreach m,lora dreambooth clustered,$m-own $m-transfer)
ablation          = evaluate.py --data $(DATA) --keep-order --references clustered \
                    --classifiers $(call classifiers,$($1.of))
# Other clusters, with models of their own.
clusters-k1.cluster         = --k 1
clusters-k2.cluster         = --k 2
clusters-k5.cluster         = --k 5
clusters-k10.cluster        = --k 10
clusters-k5-rare.cluster    = --k 5 --min-size 5
$(foreach k,k1 k2 k5 k10 k5-rare,$(eval clustered-$k.finetune = \
  $$(subst $$(RUN)/clusters,$$(RUN)/clusters-$k,$$(clustered.finetune))))
clustered-no-prior.finetune = $(subst $(prior),,$(clustered.finetune))
# Other images, of the models of clustered (dreambooth, lora).
$(foreach m,lora dreambooth clustered,$(foreach r,own transfer,$(eval $m-$r.generate = --rare $r)))
$(foreach n,50 100 500,$(eval clustered-images$n.generate = --images $n))
clustered-alpha0.generate   = --alpha 0
clustered-alpha1.generate   = --alpha 1
clustered-random.generate   = --keep 1
ablate:
	+@$(MAKE) --no-print-directory KEEP_WEIGHTS=yes ablations \
	  RECIPES='$(sort $(foreach a,$(ABLATIONS),$($a.of)))'
	@echo "Tables and figures: $(RUN)/ablations/*/results.md $(RUN)/ablations/*/worst_group.png"

# ---- tools --------------------------------------------------------------------------------------
dryrun: .venv/installed
	$(LAUNCH) $(PY) tools/dryrun.py --dataset $(DATASET) --bias $(BIAS) \
	  --model-seeds $(words $(MODEL_SEEDS)) $(DRYRUN) --out runs/dryrun-$(DATASET) \
	  --plan $(call quoted,$(GOALS)) $(PLAN)
# With the `+` each row is shown once it is measured, whatever --output-sync says.
bench: .venv/installed
	+$(if $(dry),@: )$(PY) tools/bench.py $(BENCH) --out runs/bench
