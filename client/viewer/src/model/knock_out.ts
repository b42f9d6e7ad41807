// Knock-outs. A part of the pass is named by the id of its node in a trace; without the position, as
// in `L3/HEAD_OUTPUT/h2`, it is set to zero at every position.

const PART = /^L(\d+)(?:\/p(\d+))?\/(\w+?)(?:\/e(\d+))?(?:\/[hn](\d+))?(?:\/s(\d+))?$/

interface PartPlace {
  layer: number
  position: number | undefined
  kind: string
  expert: number | undefined
  unit: number | undefined
  source: number | undefined
}

function placeOf(part: string): PartPlace | undefined {
  const match = part.match(PART)
  if (!match) return undefined
  const number = (text: string | undefined) => (text === undefined ? undefined : Number(text))
  return {
    layer: Number(match[1]),
    position: number(match[2]),
    kind: match[3] ?? '',
    expert: number(match[4]),
    unit: number(match[5]),
    source: number(match[6]),
  }
}

/** The intervention that removes a part; undefined if the part cannot be removed by itself. */
export function interventionOf(part: string): Record<string, unknown> | undefined {
  const place = placeOf(part)
  if (!place) return undefined
  const { layer, position, kind, expert, unit, source } = place
  const where = { layers: [layer], ...(position === undefined ? {} : { positions: [position] }) }
  const unitless = unit === undefined
  if (kind === 'ATTENTION_OUTPUT' || kind === 'MIXER_OUTPUT' || kind === 'MLP_OUTPUT') {
    return { ...where, site: `SITE_${kind}`, zero: true }
  }
  if (kind === 'HEAD_OUTPUT' && !unitless) {
    return { ...where, site: 'SITE_HEAD_RESULT', heads: [unit], zero: true }
  }
  if (kind === 'MLP_VALUE' && !unitless) {
    const experts = expert === undefined ? {} : { experts: [expert] }
    return { ...where, site: 'SITE_NEURONS', ...experts, neurons: [unit], zero: true }
  }
  if (kind === 'MEMORY_VALUE' && !unitless && source !== undefined) {
    const heads = [unit]
    return {
      ...where,
      site: 'SITE_ATTENTION_PATTERN',
      heads,
      sourcePositions: [source],
      block: true,
    }
  }
  return undefined
}

/** The same part at every position. */
export function everywhere(part: string): string {
  return part.replace(/\/p\d+/, '')
}

/** `L3 head 2`, for titles. */
export function partName(part: string): string {
  const place = placeOf(part)
  if (!place) return part
  const { layer, position, kind, expert, unit, source } = place
  const names: Record<string, string> = {
    ATTENTION_OUTPUT: 'attention',
    MIXER_OUTPUT: 'mixer',
    MLP_OUTPUT: 'MLP',
    HEAD_OUTPUT: `head ${unit}`,
    MLP_VALUE: `${expert === undefined ? '' : `expert ${expert} `}neuron ${unit}`,
    MEMORY_VALUE: `head ${unit}’s attention to position ${source}`,
  }
  const at = position === undefined ? '' : ` at position ${position}`
  return `L${layer} ${names[kind] ?? kind}${at}`
}
