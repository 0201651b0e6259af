"""How does text become token ids in several processes, so that a kill loses nothing and the order stays?

``pieces`` cuts files at the ends of lines, ``parts`` encodes a piece into a file that is complete or absent,
``workers`` runs that in processes, ``joining`` puts the parts in order into fairseq's .bin and .idx.

Tests: tests/unit/convert/test_preprocess_pieces.py, tests/reliability/test_preprocess.py, tests/unit/data.
"""
