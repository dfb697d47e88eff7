"""`lcp init`: a folder of folders of photos becomes a commented configuration that runs.

`survey` looks, `chain` reads what it goes on from, `kinds` and `words` guess, `choices` decides
what machine and photos decide, `recipe` and `draft` write. All that is guessed is said beside it.
"""
