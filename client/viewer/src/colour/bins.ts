// Ranks as colours: bins, not a ramp, since what counts is "first", "among the first ten", ... and
// "pushed to the very end". The colours are `--bin-N` in styles/theme.css.

export const BINS = ['top', '< 10', '< 100', '< 1k', 'middle', 'last 1k', 'last 100'] as const
export const MIDDLE = 4

/**
 * Which bin a rank is in, 0 being the top. A vocabulary of a few thousand has no middle: there a
 * rank belongs to the end that it is nearer to. Without a vocabulary's size there is no far end.
 */
export function rankBin(rank: number | undefined, vocabulary: number | undefined): number {
  if (rank === undefined) return MIDDLE
  const fromEnd = vocabulary ? vocabulary - 1 - rank : Number.POSITIVE_INFINITY
  if (fromEnd < rank) return fromEnd < 100 ? 6 : fromEnd < 1000 ? 5 : MIDDLE
  return rank === 0 ? 0 : rank < 10 ? 1 : rank < 100 ? 2 : rank < 1000 ? 3 : MIDDLE
}
