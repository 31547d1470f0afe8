"""What people do with model packages: import, verify, evaluate, report."""
