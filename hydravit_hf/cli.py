"""`python -m hydravit_hf.cli` runs the `hydravit` command, which is in `hydravit_command`."""

from hydravit_command import main

if __name__ == "__main__":
    main()
