"""The command line: one small file per verb, no logic; what a verb does lives in `loratune.api`."""
