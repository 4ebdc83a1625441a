"""One step of training on every replica, and the loop around it, made of Keras' own pieces: whether this Keras has them
is checked before any of them is imported."""

from distfit.backends.seams import check

check()
