"""What it costs: inspection beside the published implementation, messages and waiting on a federation, and growth.

python benchmarks/performance.py ~/cifar10               # an hour on 2 cores; continues where it was stopped
python benchmarks/performance.py ~/cifar10 --parts federation

inspection   time and memory of one participant's validation, against bare forward passes      inspection.csv, .png
federation   bytes, seconds and memory of a live federation with the full net                  federation.csv
growth       time and memory of 4 to 100 participants in one process                           growth.csv, .png
"""

from importlib import import_module

from common import arguments

PARTS = ("inspection", "federation", "growth")


def main():
    parser = arguments(__doc__, parallel=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    for part in args.parts:
        import_module(part).main(args.folder, args.repetitions)


if __name__ == "__main__":
    main()
