"""What runs inside a sandbox. Standard library only, imported little and late: a spare's memory and a cold call pay for each import."""
