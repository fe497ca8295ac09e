"""Log-probabilities of tokens in chunks, and stable arithmetic near probability 1.

Needs torch alone. Begin with `log_probs.py`: the front door `token_logps`, and the slow twin that tests hold it to.
"""
