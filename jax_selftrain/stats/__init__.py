"""Statistics: estimators, intervals, paired tests, non-inferiority, power."""
