"""Tools for tests of code that runs where no test can: on accelerators."""
