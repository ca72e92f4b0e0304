# The miniature: MNIST digits on coloured backgrounds, and a base model trained on printed digits; 2
# cores, no network. Values that the paper gives are the defaults of the scripts; all below are
# ours. Learning rates, prior weight, guidance scale and --balance were chosen on val (RESULTS.md),
# the numbers of steps and epochs and the recipes for a run of minutes: `make paper` has more.
RECIPES       ?= erm groupdro dfr vanilla dreambooth clustered
IMAGES        ?= 250
EPOCHS        ?= 30
CLUSTER       ?= --min-size 20
LORA          ?= --steps 150 --batch 16 --learning-rate 2e-3 --schedule cosine
DREAMBOOTH    ?= --steps 120 --batch 16 --learning-rate 6e-4 --schedule cosine
CLUSTERED     ?= --steps 60 --learning-rate 3e-4
COMPOSITIONAL ?= --steps 300 --batch 32 --learning-rate 1e-3 --schedule cosine --balance 0.25
GENERATE      ?= --steps 10 --guidance-scale 1 --batch 32 --rare own
# One process per core, one thread each: results do not depend on the number of cores, and two
# processes with one thread each are faster than one with two. A -j of your own takes precedence,
# and LAUNCH starts processes by itself.
export OMP_NUM_THREADS ?= 1
ifeq ($(MAKELEVEL)$(LAUNCH),0)
MAKEFLAGS += -j$(or $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null),2) --output-sync=target
endif
