"""The wire format of lowbit.v1 and its generated code."""
