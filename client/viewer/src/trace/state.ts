import { HashState } from '../page/hash'

/** What a link to a trace's page can say; every value is a string, '' = the page's own choice. */
export const TRACE_STATE = {
  /** Position whose story is told. */
  pos: '',
  /** What stands above: the residual stream (''), or `heads`. */
  map: '',
  /** Layers shown in detail: `3` or `2,3`. */
  layers: '',
  /** Id of the selected node. */
  sel: '',
  /** Ids of pinned nodes. */
  pin: '',
  /** Text or token id searched for. */
  q: '',
  /** Kinds hidden: attention, mlp, bias, rest. */
  hide: '',
  /** Heads whose rows of W_O are listed, as `layer.head`: `3.2,3.0`. */
  heads: '',
  /** Smallest |share| shown, in percent. */
  min: '',
  /** Only parts that add (+) or subtract (-). */
  sign: '',
  /** 1 = the strongest path to the target is followed. */
  path: '',
  /** Which view stands below the overview: the picture (''), or `table`. */
  view: '',
  theme: '',
} as const

export type TraceKey = keyof typeof TRACE_STATE
export type TraceState = HashState<TraceKey>

export function traceState(): TraceState {
  return new HashState<TraceKey>(TRACE_STATE)
}
