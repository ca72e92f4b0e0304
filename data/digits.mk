# The miniature: scikit-learn's handwritten digits on the base model of printed ones; 2 cores, no network.
# All values are ours. Learning rates, prior weight, guidance scale and --balance were chosen on val (README), the
# numbers of steps for a run of minutes, so that no method sees more images in training than dreambooth: a cluster,
# of which there are about twice as many as groups, has half of a group's steps.
IMAGES        ?= 250
EPOCHS        ?= 30
CLUSTER       ?= --min-size 20
LORA          ?= --steps 300 --batch 16 --learning-rate 2e-3 --schedule cosine
DREAMBOOTH    ?= --steps 250 --batch 16 --learning-rate 3e-4 --schedule cosine
CLUSTERED     ?= --steps 125
COMPOSITIONAL ?= --steps 800 --batch 32 --learning-rate 1e-3 --schedule cosine --balance 0.25
GENERATE      ?= --guidance-scale 1 --batch 32
