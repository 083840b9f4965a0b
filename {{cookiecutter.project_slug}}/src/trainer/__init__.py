"""Prepare data, train and evaluate the model.

data.py, model.py, train.py and evaluate.py are kept in sync with the notebooks in level_0_manual/.
"""
