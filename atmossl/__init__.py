"""atmossl: self-supervised learning on the atmosphere, where a mask decides what is predicted.

The way of one sample, from a store to a written field (`tests/test_one_sample.py` runs it):

    open_split -> read_window -> make_view (tokenise, mask, corrupt) -> collate_views
    -> objective(model, batch) -> detokenise -> Normaliser.inverse -> dataset
"""

__version__ = "0.1.0"
