"""Structural twins of implementations that no package registry carries.

Written for these tests from what the originals compute: the same class and attribute names, the
same parameters in the same shapes, the same arithmetic and the same peculiarities.
"""
