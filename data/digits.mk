# The miniature: scikit-learn's handwritten digits on the base model of printed ones; 2 cores, no network.
# All values are ours, for a run of minutes: some chosen on val, --balance and the numbers of steps first guesses.
IMAGES        ?= 250
EPOCHS        ?= 30
CLUSTER       ?= --min-size 20
LORA          ?= --steps 250 --batch 16 --learning-rate 5e-4 --schedule cosine
DREAMBOOTH    ?= --steps 250 --batch 16 --learning-rate 1e-3 --schedule cosine --prior-weight 0.3
COMPOSITIONAL ?= --steps 800 --batch 32 --learning-rate 1e-3 --schedule cosine --balance 0.5
# tells the classes of synthetic digits: erm on the digits in random colours
JUDGE         ?= runs/digits-0.5/classifiers/erm/seed0
