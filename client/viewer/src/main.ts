import { pageDescription } from './browser/streams'
import { effectsPage } from './effects/view'
import { generationPage } from './generation/view'
import { gradientPage } from './gradient/view'
import { livePage } from './live/app'
import { comparisonPage } from './trace/comparison'
import { tracePage } from './trace/view'

const VIEWS: Record<string, () => Promise<void>> = {
  trace: tracePage,
  comparison: comparisonPage,
  gradient: gradientPage,
  generation: generationPage,
  effects: effectsPage,
  live: livePage,
}

const { view } = pageDescription()
const show = VIEWS[view]
if (!show) throw new Error(`expected a view of ${Object.keys(VIEWS).join(', ')}; got ${view}`)
void show()
