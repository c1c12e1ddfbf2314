"""The mathematics of infusion training.

After Bordes, Honari and Vincent, *Learning to Generate Samples from Noise through Infusion Training* (ICLR 2017);
equations and sections are cited from there.
"""
