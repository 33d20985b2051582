"""A site's images: manifest, checks, preparation, partition, augmentation.

Import from the modules: those that need torch or MONAI are loaded only where they are used.
"""
