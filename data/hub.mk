# A dataset of the Hugging Face Hub (or a local folder of parquet files), as `load_dataset` reads
# it; needs `.venv/bin/pip install datasets`. For example:
# make DATASET=hub ROOT=grodino/waterbirds PREPARE="--y label --a place". For a name of its own,
# copy this file to data/<name>.mk and add `LOADER = hub`. Without an attribute: LABELLED= (empty).
# Its other settings are those of your own images.
ROOT     ?= grodino/waterbirds
LABELLED ?= yes
include data/folder.mk
