import { gradientPage } from './gradient/page'
import { livePage } from './live/page'
import { pageDescription } from './page/blocks'
import { tracePage } from './trace/page'

const VIEWS: Record<string, () => Promise<void>> = {
  trace: tracePage,
  gradient: gradientPage,
  live: livePage,
}

const { view } = pageDescription()
const show = VIEWS[view]
if (!show) throw new Error(`expected a view of ${Object.keys(VIEWS).join(', ')}; got ${view}`)
void show()
