# Sets `python`, the command that runs Python in a job. The sbatch files source this file; choose by
# variables in the shell that calls sbatch:
#
#   ATMOSSL_ENV=PATH                a virtual or conda environment; without any of these, .venv here
#   ATMOSSL_MODULES="NAME NAME"     environment modules to load first
#   ATMOSSL_IMAGE=PATH.sif          an Apptainer image, see docs/tutorials/slurm.md
#   ATMOSSL_BIND=PATH,PATH          folders outside of this one that the image must see, such as data
# shellcheck shell=bash

if [[ -n ${ATMOSSL_MODULES:-} ]]; then
    # shellcheck disable=SC2086  # one word for each module
    module load $ATMOSSL_MODULES
fi
if [[ -n ${ATMOSSL_IMAGE:-} ]]; then
    python=(apptainer exec --nv --bind "$PWD${ATMOSSL_BIND:+,$ATMOSSL_BIND}" --pwd "$PWD" "$ATMOSSL_IMAGE" python)
elif [[ -n ${ATMOSSL_ENV:-} ]]; then
    python=("$ATMOSSL_ENV/bin/python")
elif [[ -n ${ATMOSSL_MODULES:-} && ! -x .venv/bin/python ]]; then
    python=(python)
else
    python=(.venv/bin/python)
fi
command -v "${python[0]}" >/dev/null || {
    echo "slurm: no ${python[0]}; run scripts/setup.sh, or set ATMOSSL_ENV, ATMOSSL_MODULES or ATMOSSL_IMAGE" >&2
    exit 2
}
