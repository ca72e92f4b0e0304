# The miniature: scikit-learn's handwritten digits, and a base model trained on printed ones; 2 cores, no network.
# All values are ours. Learning rates, prior weight, guidance scale and --balance were chosen on val (RESULTS.md), the
# numbers of steps for a run of minutes. Images seen in training at bias 0.95: lora 19,200, compositional 25,600,
# dreambooth 32,000, clustered 48,000 (12 clusters).
IMAGES        ?= 250
EPOCHS        ?= 30
CLUSTER       ?= --min-size 20
LORA          ?= --steps 300 --batch 16 --learning-rate 2e-3 --schedule cosine
DREAMBOOTH    ?= --steps 250 --batch 16 --learning-rate 3e-4 --schedule cosine
CLUSTERED     ?= --steps 125
COMPOSITIONAL ?= --steps 800 --batch 32 --learning-rate 1e-3 --schedule cosine --balance 0.25
GENERATE      ?= --guidance-scale 1 --batch 32
