"""Preference data: from files and hubs to tokens, packed into rows without padding.

Holds records and their shapes, the filters of the paper, chat templates, tokens on disk, packing, and the report of what
the data holds. May import no model library: a tokenizer is handed to it; torch only to pack. Begin with `records.py`,
then `chat_format.py` (where a prompt ends and a response begins), `tokenize.py` and `pack.py`.
"""
