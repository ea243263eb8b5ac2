"""WeLore compression: ranks from spectra, calibration, the command and its report."""
