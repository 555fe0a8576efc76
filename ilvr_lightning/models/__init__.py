"""The denoising network: one U-Net that covers Ho et al. 2020 and ADM (Dhariwal and Nichol 2021)."""
