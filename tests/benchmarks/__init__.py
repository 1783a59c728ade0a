"""Programs that print ratios taken side by side in one run, and assert none: times are the machine's."""
