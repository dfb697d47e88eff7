"""`lcp init`: a folder of folders of photos becomes a commented configuration that runs.

`survey` looks, `kinds` and `words` guess, `choices` decides what machine and photos decide, `draft`
writes. All that is guessed is said beside the value, so that it can be put right.
"""
