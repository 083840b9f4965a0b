"""The model: data, network, training, evaluation. Each module is the twin of a notebook in level_0_manual/."""
