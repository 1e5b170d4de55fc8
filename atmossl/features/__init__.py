"""What an encoder sees and how it orders the weather, as arrays, figures and one page.

`attention` recomputes the attention of every head for chosen places, `latents` has principal
components of tokens, cosines and analogues, `filters` the patterns that the embedding reads.
`run` makes them all for a checkpoint, `figures` draws them, `page` puts them onto one page.
"""
