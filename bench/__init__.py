"""Measurements, one question per file.

- ``decode.py``: how long is one decode step, on the device and on the host?
- ``hf_generate.py``: what does ``generate()`` of Hugging Face models gain?
- ``startup.py``: how long is the first call in a new process, with a cold and with a warm cache?

They share ``models.py`` (the lab decoder), ``decode_variants.py`` and ``hf_variants.py`` (what is compared),
``handmade.py`` (the floors), ``graphcaps.py`` (graphcap from a checkout), ``harness.py`` (timing) and ``record.py``
(the JSON files). ``table.py`` renders the tables of the README from them.
Run them from the repository's root, for example ``PYTHONPATH=. python -m bench.decode --models 0.6b --batch 1``.
"""
